"""examples/paper: readers of file formats, the paper's settings, and the command, on files that the tests write."""

import gzip
import json
import logging
import math
import os
import pickle
import signal
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from typer.testing import CliRunner

from tests.distributed import processes
from tests.reference import Array, directions, dot

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from paper import data, figures, plan, sensitivity, settings, training
from paper.__main__ import app
from paper.models import make_network
from paper.settings import Base, Name, Run

Bytes = npt.NDArray[np.uint8]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty.*"),
]


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    """What the command sets for the whole process is set back afterwards."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


# ---------------------------------------------------------------------- files


def idx(array: Bytes) -> bytes:
    """An array in the IDX format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder: Path, count: int = 256, compressed: bool = True) -> dict[str, Bytes]:
    """scikit-learn's digits in the files of MNIST, enlarged to 28 × 28."""
    folder.mkdir(parents=True, exist_ok=True)
    (x, y), (val_x, val_y) = data.digits().train, data.digits().val
    arrays = dict(zip(data.IDX_FILES, (each.numpy() for each in (x, y, val_x, val_y)), strict=True))
    for name, array in arrays.items():
        array = array[:count].astype(np.uint8)
        if "images" in name:
            array = np.pad(array[:, 0].repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
        arrays[name] = array
        content = gzip.compress(idx(array)) if compressed else idx(array)
        (folder / f"{name}{'.gz' if compressed else ''}").write_bytes(content)
    return arrays


def cifar_batches() -> dict[str, tuple[Bytes, list[int]]]:
    """Images, as rows of 3,072 bytes, and labels of each file."""
    rng = np.random.default_rng(0)
    return {
        name: (rng.integers(0, 256, (7, 3072), np.uint8), [int(i) for i in rng.integers(0, 10, 7)])
        for name in data.CIFAR_FILES
    }


def python_2_pickle(images: Bytes, labels: list[int]) -> bytes:
    """A dictionary as Python 2 has pickled it: its strings are bytes, and numpy had no underscore."""
    rows, numbers = (pickle.dumps(each, protocol=2)[2:-1] for each in (images, labels))
    rows = rows.replace(b"numpy._core.", b"numpy.core.")
    return b"\x80\x02}U\x04data" + rows + b"sU\x06labels" + numbers + b"s."


@pytest.mark.parametrize("compressed", [False, True])
def test_the_files_of_mnist_are_read(compressed: bool, tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path / "MNIST" / "raw", compressed=compressed)
    gray, large = data.find_images([tmp_path])
    for (x, y), part in ((gray.train, "train"), (gray.val, "t10k")):
        assert np.array_equal(x[:, 0], arrays[f"{part}-images-idx3-ubyte"])
        assert np.array_equal(y, arrays[f"{part}-labels-idx1-ubyte"])
        assert (x.dtype, y.dtype) == (torch.uint8, torch.int64)
    assert large.train[0].shape == (256, 1, 32, 32)
    assert torch.equal(large.train[0][:, :, 2:-2, 2:-2], gray.train[0])
    assert large.train[0].sum() == gray.train[0].sum()


@pytest.mark.parametrize("binary", [False, True])
def test_the_files_of_cifar_are_read(binary: bool, tmp_path: Path) -> None:
    batches = cifar_batches()
    for name, (images, labels) in batches.items():
        records = np.concatenate([np.array(labels, np.uint8)[:, None], images], axis=1)
        (tmp_path / (f"{name}.bin" if binary else name)).write_bytes(
            records.tobytes() if binary else python_2_pickle(images, labels)
        )
    gray, colour = data.find_images([tmp_path], default=tmp_path)
    assert gray.source == "digits"
    assert colour.train[0].shape == (35, 3, 32, 32)
    images, labels = batches["data_batch_2"]
    assert colour.train[1][7:14].tolist() == labels
    assert colour.train[0][8, 1, 3, 5] == images[1, 1024 + 3 * 32 + 5], "red, green, blue, each row by row"
    assert colour.val[1].tolist() == batches["test_batch"][1]


GOOD = idx(np.zeros((2, 3, 3), np.uint8))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x00\x00\x0d\x03" + GOOD[4:], "begins with 0x00000d03"),
        (b"<html>", "begins with 0x3c68746d"),
        (b"", "begins with 0x"),
        (GOOD[:-1], r"damaged: cannot reshape array of size 17 into shape \(2,3,3\)"),
        (GOOD[:9], "damaged"),
        (gzip.compress(GOOD, mtime=0)[:-9], "cannot be decompressed"),
        (gzip.compress(GOOD, mtime=0)[:10] + b"\xff" * 20, "cannot be decompressed"),
    ],
)
def test_what_is_no_idx_file_is_named(content: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=f"{path}.*{what}"):
        data.read_idx(path)


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_what_is_no_batch_of_cifar_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data_batch_1"
    for content in (b"", b"abc", pickle.dumps({b"data": 1}), pickle.dumps(Harmful(tmp_path / "made"))):
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=str(path)):
            data.read_pickled(path)
    assert not (tmp_path / "made").exists(), "a pickle has called a function"
    for content in (b"", bytes(3072), b"\x0a" + bytes(3072)):
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=str(path)):
            data.read_binary(path)


def test_folders_without_files_or_with_too_many_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["--data-dir", str(tmp_path / "empty")])
    assert result.exit_code == 2
    assert "there is no file train-images-idx3-ubyte" in result.output
    write_mnist(tmp_path / "a")
    write_mnist(tmp_path / "b")
    with pytest.raises(data.DataError, match=f"several folders .*{tmp_path / 'a'}, {tmp_path / 'b'}"):
        data.find_images([tmp_path])
    (tmp_path / "a" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(data.DataError, match=f"{tmp_path / 'a'} has no file t10k-labels-idx1-ubyte"):
        data.find_images([tmp_path / "a"])


def test_digits_are_the_last_resort(tmp_path: Path) -> None:
    gray, large = data.find_images([], default=tmp_path)
    assert gray.source == "digits"
    assert large.train[0].shape == (1437, 1, 32, 32)
    assert torch.equal(large.train[0][:, :, ::4, ::4], gray.train[0])


# ---------------------------------------------------------------------- settings


def test_the_settings_are_the_papers() -> None:
    names: tuple[Name, ...] = ("logreg", "mlp", "vgg")
    assert settings.BATCH == 128
    assert plan.PAPER.epochs == {"logreg": 10, "mlp": 100, "vgg": 200}
    for name in names:
        runs = plan.paper_runs(name, plan.PAPER, data.digits())
        assert [run.name for run in runs] == [
            *("SGD", "SGD-HD", "SGD-auto", "SGDN", "SGDN-HD", "SGDN-auto", "Adam", "Adam-HD", "Adam-auto")
        ]
        for run in runs:
            optimizer = settings.make_optimizer(run, [nn.Parameter(torch.ones(1))])
            (group,) = optimizer.param_groups
            assert (group["lr"], group["weight_decay"]) == (0.001, 1e-4)
            assert type(optimizer) is (Adam if run.base == "Adam" else SGD)
            if run.base == "Adam":
                assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
            else:
                assert (group["momentum"], group["nesterov"]) == ((0.9, True) if run.base == "SGDN" else (0.0, False))
            callbacks = settings.make_callbacks(run)
            assert [callback.rule for callback in callbacks] == ([] if run.rule == "none" else [run.rule])
            if run.rule == "additive":
                beta = 1e-3 if run.base != "Adam" else 1e-8 if name == "vgg" else 1e-7
                assert (callbacks[0].hypergrad_lr, callbacks[0].min_lr) == (beta, None)


@pytest.mark.parametrize(
    ("name", "shape", "linear", "convolutions"),
    [
        ("logreg", (1, 28, 28), [784 * 10], []),
        ("mlp", (1, 28, 28), [784 * 1000, 1000 * 1000, 1000 * 10], []),
        (
            *("vgg", (3, 32, 32), [512 * 512, 512 * 512, 512 * 10]),
            [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512],
        ),
    ],
)
def test_the_networks_are_the_papers(
    name: str, shape: tuple[int, ...], linear: list[int], convolutions: list[int]
) -> None:
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    network = make_network(name, images)
    assert network.eval()(images).shape == (2, 10)
    layers = list(network.modules())
    assert [each.weight.numel() for each in layers if isinstance(each, nn.Linear)] == linear
    assert [each.out_channels for each in layers if isinstance(each, nn.Conv2d)] == convolutions
    assert [each.num_features for each in layers if isinstance(each, nn.BatchNorm2d)] == convolutions


# ---------------------------------------------------------------------- training


def small(base: Base = "SGD", rule: settings.Rule = "additive", epochs: int = 12, **others: Any) -> Run:
    beta = settings.EXPERIMENTS["logreg"].betas[base] if rule == "additive" else 0.0
    return replace(Run("logreg", base, rule, 0.001, beta, epochs, "digits", 300), **others)


def softmax_regression(w: Array, b: Array, x: Array, y: Array) -> tuple[float, list[Array]]:
    """The loss and its gradient, with weight decay, by hand."""
    z = x @ w.T + b
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    loss = -np.mean(np.log(p[np.arange(len(y)), y]))
    error = (p - np.eye(10)[y]) / len(y)
    return float(loss), [error.T @ x + 1e-4 * w, error.sum(axis=0) + 1e-4 * b]


@pytest.mark.parametrize(
    ("base", "method", "momentum"), [("SGD", "sgd", {}), ("SGDN", "sgdn", {"momentum": 0.9}), ("Adam", "adam", {})]
)
def test_a_run_is_that_of_the_papers_formulas(
    base: Base, method: str, momentum: dict[str, float], tmp_path: Path
) -> None:
    run, images = small(base), data.digits()
    training.train(run, images, tmp_path, lambda count: None)
    measured = training.load(run, tmp_path)

    torch.manual_seed(run.seed)
    images_used, labels = images.train[0][:300], images.train[1][:300].numpy()
    w, b = (p.detach().double().numpy() for p in make_network("logreg", images_used).parameters())
    x = images_used.double().numpy().reshape(300, 64)
    x = (x - x.mean()) / x.std(ddof=1)
    order = training.Shuffled(300, run.seed)
    direction, last, lr = directions(method, momentum), None, run.alpha_0
    next(direction)
    lrs, losses = [], []
    for epoch in range(run.epochs):
        order.set_epoch(epoch)
        for batch in order:
            loss, g = softmax_regression(w, b, x[batch.numpy()], labels[batch.numpy()])
            lr += run.beta * dot(g, last) if last is not None else 0.0
            last = direction.send(g)
            w, b = w - lr * last[0], b - lr * last[1]
            lrs.append(lr)
            losses.append(loss)
    assert len(losses) == 36
    assert max(lrs) > 1.0005 * run.alpha_0
    np.testing.assert_allclose(measured.rates, lrs, rtol=1e-4)
    np.testing.assert_allclose(measured.losses, losses, rtol=1e-4)


def train_until_killed(run: Run, out: Path) -> str:
    """Make a run up to its eighth iteration, in which the process is killed."""
    seen = 0

    def count(iterations: int) -> None:
        nonlocal seen
        seen += iterations
        if seen == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    training.train(run, data.as_large_as_cifar(data.digits()), out, count)
    return "not killed"


def test_a_run_whose_process_is_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """With dropout, batch norm and the direction of the last step; the kill is in the third of four epochs."""
    run = Run("vgg", "SGDN", "additive", 0.001, 1e-3, 4, "digits", 300, width=1 / 64)
    images = data.as_large_as_cifar(data.digits())
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    training.train(run, images, whole, lambda count: None)
    assert processes.run(train_until_killed, 1, run, cut) == [None]
    assert [path.name for path in cut.iterdir()] == [f"{run.file}.ckpt"]
    counts: list[int] = []
    training.train(run, images, cut, counts.append)
    assert counts == [6, 1, 1, 1, 1, 1, 1]
    assert [path.name for path in cut.iterdir()] == [f"{run.file}.json"]
    assert (cut / f"{run.file}.json").read_text() == (whole / f"{run.file}.json").read_text()
    assert len(training.load(run, cut).val_losses) == 4


def test_a_run_ends_at_the_threshold_or_where_it_diverges(tmp_path: Path) -> None:
    run = small("Adam", "none", epochs=60, alpha_0=0.01, threshold=0.3)
    training.train(run, data.digits(), tmp_path, lambda count: None)
    losses = training.load(run, tmp_path).losses
    means = [float(np.mean(losses[end - 50 : end])) for end in range(50, len(losses) + 1)]
    assert 50 < len(losses) < 180
    assert means[-1] <= 0.3
    assert means[-2] > 0.3
    diverging = small("SGD", "none", alpha_0=1e30)
    training.train(diverging, data.digits(), tmp_path, lambda count: None)
    losses = training.load(diverging, tmp_path).losses
    assert len(losses) < 36
    assert [math.isfinite(loss) for loss in losses] == [True] * (len(losses) - 1) + [False]


# ---------------------------------------------------------------------- the command


def test_the_command_makes_figures_and_tables_and_no_run_twice(tmp_path: Path) -> None:
    write_mnist(tmp_path / "data", count=128)
    out = tmp_path / "out"
    arguments = ["--data-dir", tmp_path / "data", "--quick", "--epochs", 2, "--width", 0.02, "--threshold", 2.3]

    def call(*parts: str) -> dict[str, int]:
        """Which files of runs there are then, and when they were made."""
        result = CliRunner().invoke(app, list(map(str, [*parts, *arguments, "--out", out])))
        assert result.exit_code == 0, result.output
        return {path.name: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}

    made = call("vgg", "mlp", "sensitivity")
    assert len(made) == 2 * 9 + 3 * (3 + 3 + 1)
    for name in ("mlp", "vgg", "sensitivity"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "table.md").read_text()
    _, row = (line.split(" | ") for line in text.splitlines() if line.startswith("| SGDN-HD |"))
    (path,) = (out / "runs").glob("mlp-SGDN-HD-*.json")
    measured = json.loads(path.read_text())["measured"]
    assert row[1:3] == [f"{max(measured['rates']):.2g}", f"{measured['rates'][1]:.2g}"]
    assert row[3:5] == [f"{measured['losses'][1]:.3f}", f"{measured['val_losses'][1]:.3f}"]
    assert row[5] == f"{measured['val_accuracies'][1]:.1%} |"

    path.unlink()
    again = call("mlp", "sensitivity")
    assert {name for name in made if again[name] != made[name]} == {path.name}
    assert json.loads(path.read_text())["measured"] == measured
    assert text.endswith((out / "table.md").read_text())


def fake(run: Run, losses: list[float]) -> training.Measured:
    return training.Measured(losses, [run.alpha_0] * len(losses), [0.5] * run.epochs, [0.9] * run.epochs)


def test_the_figure_shows_what_was_measured() -> None:
    run = small(epochs=2)
    measured = {each: fake(each, [2.0, 1.0, 0.0, 0.5, 0.5, 0.2]) for each in (run, replace(run, base="Adam"))}
    figure = figures.draw(measured)
    rates, losses, val_losses = figure.axes[0], figure.axes[3], figure.axes[6]
    assert losses.lines[0].get_ydata() == pytest.approx([1.0, 0.4])
    assert rates.lines[0].get_ydata() == pytest.approx([0.001, 0.001])
    assert val_losses.lines[0].get_xdata() == pytest.approx([1, 2])
    assert rates.child_axes[0].lines[0].get_ydata() == pytest.approx([0.001] * 6)


def test_the_sensitivity_figure_and_its_table_count_iterations() -> None:
    runs = plan.grid_runs(plan.QUICK, data.digits(), threshold=0.3)
    slow = next(run for run in runs if (run.name, run.alpha_0) == ("SGD", 1e-5))
    measured = {run: fake(run, [1.0] * 60 + [0.2] * (10 if run == slow else 60)) for run in runs}
    lines = sensitivity.make_table(measured).splitlines()
    assert lines[0] == "Iterations to a training loss of 0.3; – where it was not reached in 72."
    assert lines[4:7] == [
        "| SGD, without | – | 120 | 120 |",
        "| SGD, -HD, β = 0.001 | 120 | 120 | 120 |",
        "| SGD, rule auto |  | 120 |  |",
    ]
    without, hd, auto = sensitivity.draw(measured).axes[0].lines
    assert without.get_ydata() == pytest.approx([144, 120, 120])
    assert hd.get_ydata() == pytest.approx([120, 120, 120])
    assert auto.get_ydata() == pytest.approx([120, 120])
