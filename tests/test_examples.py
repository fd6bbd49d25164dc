"""The examples, in short: they learn, and the callback leaves the configured rate."""

import logging
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_callback import events, scalars

EXAMPLES = Path(__file__).parent.parent / "examples"


OUTPUTS = EXAMPLES.parent / "docs" / "outputs"

Start = Callable[..., str]


def words(output: str) -> list[str]:
    """What an example prints, without its numbers."""
    return re.findall(r"[A-Za-z]{2,}", output)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Start]:
    """Runs an example with arguments as a script, but in this process, and returns what it prints."""
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level  # the examples change it

    def start(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        output = capsys.readouterr().out
        shown = (OUTPUTS / f"{Path(name).stem}.txt").read_text()
        assert words(output) == words(shown), "the site shows something else: run docs/scripts.py"
        return output

    yield start
    logger.setLevel(level)


def table(output: str) -> list[dict[str, float]]:
    """The rows of what an example prints, with the heading of each number."""
    head, *lines = (re.split(r"  +", line.strip()) for line in output.splitlines())
    return [dict(zip(head, map(float, numbers), strict=True)) for _, *numbers in lines]


def test_every_example_is_in_the_table_of_examples() -> None:
    names = re.findall(r"^\| \[`(\w+\.py)`\]\((\w+\.py)\) \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(names) == sorted((file.name, file.name) for file in EXAMPLES.glob("*.py"))
    assert {file.stem for file in OUTPUTS.iterdir()} == {file.stem for file in EXAMPLES.glob("*.py")}


def test_the_quickstart_repairs_a_bad_rate(start: Start, tmp_path: Path) -> None:
    output = start("quickstart.py", "--epochs", "15")
    rows = {line[:22].strip(): [float(x) for x in line[22:].split()] for line in output.splitlines() if "e-05" in line}
    assert rows["without"][0] < 0.5
    accuracy, loss, first, usual = rows["HypergradientDescent"]
    assert accuracy > 0.95
    assert loss < 0.2
    assert first == 1e-5
    assert usual > 1e-3
    assert "tensorboard --logdir runs/quickstart" in output
    start("quickstart.py", "--epochs", "1")
    folders = [file.parent for file in tmp_path.rglob("events.out.tfevents.*")]
    names = {f"runs/{own}/{name}" for own in ("quickstart", "quickstart-2") for name in ("plain", "hypergradient")}
    assert sorted(str(folder.relative_to(tmp_path)) for folder in folders) == sorted(names)
    tags = {tag for folder in folders for tag in events(folder).Tags()["scalars"]}
    assert {"hd/log10_lr-SGD", "val_loss"} < tags
    assert "hp_metric" not in tags
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # which git ignores


@pytest.mark.parametrize(
    "arguments",
    [
        ("plain.py", "--epochs", "5"),
        ("fabric.py", "--epochs", "5"),
        ("fine_tuning.py", "--epochs", "12"),
        ("adapters.py", "--epochs", "12"),
    ],
)
def test_digits_are_learned_from_a_rate_that_is_too_small(arguments: tuple[str, ...], start: Start) -> None:
    *constant, tuned = table(start(*arguments))
    (same,) = (row for row in constant if row["configured"] == tuned["configured"])
    assert same["val accuracy"] < 0.5
    assert tuned["val accuracy"] > 0.8
    assert tuned["val loss"] < 0.5 * same["val loss"]
    assert tuned["median lr"] > 10 * tuned["configured"]
    assert all(row["median lr"] == row["last lr"] == row["configured"] for row in constant)


def test_the_transformer_predicts_characters(start: Start) -> None:
    low, high, tuned = table(start("transformer.py", "--steps", "60"))
    assert max(row["val loss"] for row in (low, high, tuned)) < 3  # nats; the logarithm of 128 is 4.9
    assert tuned["val loss"] < low["val loss"]
    assert tuned["median lr"] > 1.5 * tuned["configured"] == 1.5 * low["configured"]


def test_the_command_line_takes_the_callback_from_the_file_or_leaves_it_out(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    found = []
    for change in (("--trainer.callbacks.max_lr", "0.005"), ("--trainer.callbacks", "null")):
        configuration = ("fit", "--config", str(EXAMPLES / "cli.yaml"), "--trainer.max_epochs", "8")
        output = start("cli.py", *configuration, *change)
        found.append([float(number) for number in re.findall(r"val \w+ ([\d.]+)", output)])
    (accuracy, loss), (accuracy_without, loss_without) = found
    assert accuracy > 0.9 > 0.5 > accuracy_without
    assert loss < 0.5 < 2 < loss_without
    rates = scalars(tmp_path / "runs" / "cli" / "lightning_logs" / "version_0", "hd/lr-Adam")
    assert 0.0045 < max(rates.values()) <= 0.005
    assert min(rates.values()) < 2e-5


@pytest.mark.slow
def test_hugging_face_tunes_its_own_optimizer(tmp_path: Path) -> None:
    """In a process of its own, as users start it, that reaches no model hub."""
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    process = subprocess.run(
        [sys.executable, str(EXAMPLES / "hugging_face.py"), "--epochs", "6"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    *without, tuned = table(process.stdout)
    assert without[0]["configured"] == tuned["configured"]
    assert without[0]["val accuracy"] < 0.5 < 0.7 < tuned["val accuracy"]
    assert tuned["last scale"] > 10
    assert all(row["last scale"] == 1 for row in without)


def test_hugging_face_reports_the_loss_of_all_accumulated_batches(tmp_path: Path) -> None:
    """With batches of 8, or with those of 4 and 2 that are accumulated; the last step of an epoch has 6 images only."""
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    names = runpy.run_path(str(EXAMPLES / "hugging_face.py"))
    found = []
    for size in (8, 4, 2):
        names["set_seed"](0)
        shape = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 10, "hidden_size": 16}
        config = names["ViTConfig"](**shape, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        data = [{"pixel_values": torch.randn(1, 8, 8), "labels": i % 10} for i in range(22)]
        callback, losses = names["Hypergradient"](), list[float]()

        def note(*_: Any, **others: Any) -> None:
            losses.append(callback.hd.stats.loss)  # noqa: B023

        notes = type("Notes", (names["TrainerCallback"],), {"on_optimizer_step": note})
        arguments = names["TrainingArguments"](
            output_dir=str(tmp_path),
            num_train_epochs=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        model = names["ViTForImageClassification"](config)
        names["Trainer"](model, arguments, train_dataset=data, callbacks=[callback, notes()]).train()
        found.append(losses)
    assert len(found[0]) == 9
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[2] == pytest.approx(found[0], rel=1e-3)
