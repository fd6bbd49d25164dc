"""HypergradientDescent through LightningCLI: from the command line and from configuration files."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_hd import Additive, Auto, Context, HypergradientDescent, Multiplicative, Observation, Rule
from tests.test_callback import Reference, make_trainer, same, scalars

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
]

ADD = "--trainer.callbacks+=lightning_hd.HypergradientDescent"

SETTINGS: dict[str, dict[str, Any]] = {
    "rule": {"additive": "additive", "multiplicative": "multiplicative", "auto": "auto"},
    "hypergrad_lr": {"0.05": 0.05, "0": 0, "null": None},  # the last one beside "auto", which takes no other
    "scope": {"group": "group", "global": "global"},
    "min_lr": {"1e-4": 1e-4, "null": None},
    "max_lr": {"0.5": 0.5, "null": None},
    "probe": {"1000": 1000, "null": None, "default": "default"},
    "log_every_n_steps": {"3": 3, "0": 0, "null": None},
    "prog_bar": {"true": True, "false": False},
    "cooldown": {"0.5": 0.5, "0": 0, "default": "default"},
    "stop_after": {"10": 10, "null": None},
    "scheduled": {"true": True, "false": False, "null": None},
    "on_mismatch": {"restart": "restart", "error": "error"},
    "summary": {"true": True, "false": False},
    "warm_start": {"true": True, "false": False},
}
"""What can be written for each argument of the constructor, and what it means."""


class Sign(Rule):
    """A rule of a user's own, without arguments."""

    def update(self, lr: float, seen: Observation, context: Context) -> float:
        return lr * (1.01 if seen.cosine > 0 else 0.99)


def option(name: str, value: str) -> str:
    return f"--trainer.callbacks.{name}={value}"


def command_line(path: Path, *arguments: str, run: bool = True) -> LightningCLI:
    trainer = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "limit_train_batches": 20,
        "enable_checkpointing": "false",
        "enable_progress_bar": "false",
        "enable_model_summary": "false",
        "default_root_dir": path,
    }
    settings = [f"--trainer.{name}={value}" for name, value in trainer.items()]
    return LightningCLI(Reference, run=run, args=[*(["fit"] if run else []), *settings, *arguments])


def callback_of(cli: LightningCLI) -> HypergradientDescent:
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    (hd,) = (callback for callback in callbacks if isinstance(callback, HypergradientDescent))
    return hd


@pytest.mark.parametrize("turn", range(3))
def test_every_argument_can_be_set(tmp_path: Path, turn: int) -> None:
    """In each turn, all arguments together, each with the next of its values."""
    assert SETTINGS.keys() == inspect.signature(HypergradientDescent).parameters.keys()
    assert max(map(len, SETTINGS.values())) == 3
    chosen = {name: list(values.items())[turn % len(values)] for name, values in SETTINGS.items()}
    cli = command_line(tmp_path, ADD, *(option(name, written) for name, (written, _) in chosen.items()), run=False)
    assert {name: getattr(callback_of(cli), name) for name in chosen} == {
        name: value for name, (_, value) in chosen.items()
    }


def test_all_arguments_together_train_as_from_python(tmp_path: Path) -> None:
    arguments = {
        "rule": "multiplicative",
        "hypergrad_lr": 0.2,
        "scope": "group",
        "min_lr": None,
        "max_lr": 0.02,
        "probe": 5000,
        "log_every_n_steps": 4,
        "prog_bar": True,
        "cooldown": 0.3,
        "stop_after": 15,
        "scheduled": None,
        "on_mismatch": "restart",
        "summary": True,
        "warm_start": True,
    }
    assert arguments.keys() == inspect.signature(HypergradientDescent).parameters.keys()
    written = {name: {None: "null", True: "true"}.get(value, str(value)) for name, value in arguments.items()}  # type: ignore[call-overload]
    cli = command_line(tmp_path, ADD, *(option(name, value) for name, value in written.items()))
    hd, module = HypergradientDescent(**arguments), Reference()  # type: ignore[arg-type]
    make_trainer(tmp_path / "python", hd, limit_train_batches=20).fit(module)
    assert callback_of(cli).lrs == hd.lrs
    assert same(cli.model, module)
    assert max(hd.lrs["lr-SGD"]) == 0.02
    assert list(scalars(tmp_path, "hd/scale-SGD")) == [3, 7, 11, 15, 19]
    assert "hd/lr-SGD" in cli.trainer.progress_bar_metrics


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (
            ["rule=lightning_hd.Additive", "rule.hypergrad_lr=0.002", "rule.limit_lr=0.05"],
            lambda: Additive(0.002, 0.05),
        ),
        (["rule=lightning_hd.Multiplicative", "rule.init_args.limit_lr=0.05"], lambda: Multiplicative(limit_lr=0.05)),
        (["rule=lightning_hd.Auto", "rule.start=configured"], lambda: Auto("configured")),
        (["rule=lightning_hd.Additive"], Additive),
        (["rule=tests.test_cli.Sign"], Sign),
    ],
)
def test_a_rule_object_is_named_by_its_class(tmp_path: Path, arguments: list[str], rule: Callable[[], Rule]) -> None:
    cli = command_line(tmp_path, ADD, *(option(*argument.split("=")) for argument in arguments))
    hd = HypergradientDescent(rule())
    make_trainer(tmp_path / "python", hd, limit_train_batches=20).fit(Reference())
    assert callback_of(cli).lrs == hd.lrs


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("multiplicative", "multiplicative"),
        ("{class_path: lightning_hd.Auto, init_args: {start: configured}}", Auto("configured")),
        ("{class_path: tests.test_cli.Sign}", Sign()),
    ],
)
def test_a_configuration_file_and_the_one_that_is_saved(tmp_path: Path, written: str, rule: Any | Rule) -> None:
    file = tmp_path / "hd.yaml"
    file.write_text(
        "trainer:\n  callbacks:\n    - class_path: lightning_hd.HypergradientDescent\n"
        f"      init_args:\n        rule: {written}\n        min_lr: null\n        max_lr: 0.1\n"
    )
    first = command_line(tmp_path, "--config", str(file))
    hd = HypergradientDescent(rule, min_lr=None, max_lr=0.1)
    make_trainer(tmp_path / "python", hd, limit_train_batches=20).fit(Reference())
    assert callback_of(first).lrs == hd.lrs

    saved = Path(first.trainer.log_dir or "") / "config.yaml"
    again = LightningCLI(Reference, args=["fit", "--config", str(saved)])
    assert callback_of(again).lrs == hd.lrs
    assert same(first.model, again.model)
    assert (Path(again.trainer.log_dir or "") / "config.yaml").read_text() == saved.read_text()


def test_help_tells_every_argument_as_the_docstring_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        LightningCLI(Reference, args=["fit", "--trainer.callbacks.help=lightning_hd.HypergradientDescent"])
    shown = "".join(capsys.readouterr().out.split())
    _, _, rest = inspect.cleandoc(HypergradientDescent.__doc__ or "").partition("\nArgs:\n")
    told = dict(re.findall(r"^    (\w+): (.*(?:\n     .*)*)", rest.partition("\n\n")[0], flags=re.MULTILINE))
    assert told.keys() == inspect.signature(HypergradientDescent).parameters.keys()
    for name, words in told.items():
        assert f"--trainer.callbacks.{name}" in shown
        assert "".join(words.split()) in shown


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("rule", "unknown", r"rule(.|\n)*auto(.|\n)*unknown"),
        ("hypergrad_lr", "0.1", "hypergrad_lr=0.1 has no effect on rule='auto'"),
        ("max_lr", "-1", r"max_lr must be above 0, got -1"),
        ("min_lr", "small", "min_lr(.|\n)*small"),
        ("scope", "all", "scope(.|\n)*all"),
        ("log_every_n_steps", "2.5", "log_every_n_steps(.|\n)*2.5"),
        ("learning_rate", "1", "learning_rate(.|\n)*( is not accepted|NestedArg)"),
    ],
)
def test_a_bad_value_is_named(
    tmp_path: Path, name: str, value: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, SystemExit)) as error:
        command_line(tmp_path, ADD, option(name, value))
    assert re.search(words, f"{error.value}\n{capsys.readouterr().err}")
