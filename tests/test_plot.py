"""The figure of what runs have logged: from files that real Trainers have written, by the command and from Python."""

import csv
import itertools
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter

from lightning_hd import HypergradientDescent
from lightning_hd.__main__ import main
from lightning_hd.reporting import Curves, PlotError, figure, load, plot, save
from lightning_hd.reporting.names import tag
from lightning_hd.reporting.plotting import check_file
from lightning_hd.reporting.runs import Curve
from tests.test_callback import Reference, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("error:::matplotlib"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

SCRIPT = """
import runpy, sys
import torchmetrics  # uses matplotlib where it is installed

def command(*options):
    sys.argv[1:] = ["plot", *runs, *options]
    try:
        runpy.run_module("lightning_hd", run_name="__main__", alter_sys=True)  # python -m lightning_hd
    except SystemExit as stop:
        return stop.code

runs = sys.argv[1:]
there = sys.modules["matplotlib"]
sys.modules.update(matplotlib=None, typer=None)
import lightning_hd
assert command() == 2
sys.modules["matplotlib"] = there
del sys.modules["typer"]
assert command() == 0
assert command("-o", "figure.svg") == 0
assert command("--output", "figure.pdf") == 0
"""
"""Runs the command four times in one process: without the packages of the extra, and for each format."""


def body_and_head(network: nn.Module) -> Adam:
    parameters = list(network.parameters())
    return Adam([{"params": parameters[:2], "name": "body"}, {"params": parameters[2:], "name": "head"}], lr=0.01)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: in event files, in a CSV file with two groups, and without the callback."""
    root = tmp_path_factory.mktemp("runs")
    for logger, callback, module in (
        (TensorBoardLogger(root, "sgd", "v2"), HypergradientDescent(), Reference()),
        (CSVLogger(root, "adam", "v10"), HypergradientDescent(scope="group"), Reference(body_and_head)),
        (CSVLogger(root, "plain", "v1"), LearningRateMonitor(log_momentum=True, log_weight_decay=True), Reference()),
    ):
        every = 1 if isinstance(logger, TensorBoardLogger) else 5
        make_trainer(root, callback, logger=logger, log_every_n_steps=every, limit_train_batches=120).fit(module)
    return root


def write_csv(folder: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.csv").open("w", newline="") as lines:
        csv.writer(lines).writerows([columns, *zip(*columns.values(), strict=True)])
    return folder


def logged(folder: Path, name: str) -> Curve:
    """What a run has logged, read without the code that is tested."""
    if (folder / "metrics.csv").exists():
        with (folder / "metrics.csv").open() as lines:
            rows = [row for row in csv.DictReader(lines) if row[name]]
        return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]
    events = EventAccumulator(str(folder)).Reload().Scalars(name)
    return [event.step for event in events], [event.value for event in events]


def panels(drawn: Figure) -> dict[str, Axes]:
    return {axes.get_ylabel(): axes for axes in drawn.axes}


def named(axes: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axes.lines if not str(line.get_label()).startswith("_")}


def thin(axes: Axes, line: Line2D) -> Line2D:
    """The line of the numbers themselves that belongs to one of running means."""
    (found,) = (x for x in axes.lines if x.get_color() == line.get_color() and x.get_linewidth() == 0.5)
    return found


def assert_holds(line: Line2D, curve: Curve) -> None:
    steps, values = curve
    assert len(steps) > 20
    np.testing.assert_array_equal(line.get_xdata(), steps)
    np.testing.assert_array_equal(line.get_ydata(), values)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["plot", *arguments])
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    return line


# ---------------------------------------------------------------------- the command


def test_the_command_writes_each_format_and_the_package_needs_no_extra(runs: Path, tmp_path: Path) -> None:
    folders = [str(runs / name) for name in ("sgd", "adam", "plain")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *folders], cwd=tmp_path, capture_output=True, text=True)
    assert "Error: matplotlib is missing: pip install matplotlib typer" in done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    names = ["lightning_hd.png", "figure.svg", "figure.pdf"]
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"{name}: 3 runs, 10 curves" for name in names])
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    image = plt.imread(tmp_path / "lightning_hd.png")
    assert image.shape[1] == 1050  # 3.5 inches
    assert image.shape[0] > 1000
    assert image[..., :3].std() > 0.05
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "figure.svg").read_text())
    assert {"learning rate", "loss", "cosine", "step", "sgd/v2", "adam/v10 · Adam/head", "plain/v1"} <= set(texts)
    pdf = (tmp_path / "figure.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/FontFile2" in pdf
    assert b"/Type3" not in pdf


@pytest.mark.parametrize("missing", ["matplotlib", "typer"])
def test_a_missing_package_is_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert refused(capsys, str(tmp_path)) == f"Error: {missing} is missing: pip install matplotlib typer"
    if missing == "matplotlib":
        with pytest.raises(ModuleNotFoundError, match="pip install matplotlib typer"):
            figure([Curves("run", {"SGD": ([1], [0.1])})])


def test_errors_are_one_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.touch()
    without = write_csv(tmp_path / "without", {"step": [1, 2], "loss": [1, 2], "epoch": [0, 0]})
    dead = write_csv(tmp_path / "dead", {"step": [1, 2], "lr-SGD": [0, "nan"]})
    broken = write_csv(tmp_path / "broken", {})
    (broken / "metrics.csv").write_bytes(b"step,loss\n1,\xff\xfe\n")
    out = ["-o", str(tmp_path / "figure.png")]
    for arguments, words in (
        ([str(tmp_path / "nowhere")], f"folder does not exist: {tmp_path / 'nowhere'}"),
        ([str(file)], f"{file} is not a folder"),
        ([str(runs), ""], "the name of a folder is empty"),
        (
            [str(runs), str(empty)],
            f"no runs in {empty}: looked for events.out.tfevents.* and metrics.csv, in the folders below as well",
        ),
        ([str(without)], f"no run has logged a learning rate in {without}: looked for the tags hd/lr-NAME,"),
        ([str(without), "--loss", "mine"], "no run has logged 'mine'; the tags are: epoch, loss"),
        ([str(dead)], "nothing to draw: there is no finite number, and no learning rate above 0"),
        ([str(broken)], f"{broken / 'metrics.csv'} cannot be read: "),
        ([str(runs), "-o", "figure.jpg"], "cannot write figure.jpg: its name must end in .png, .svg or .pdf"),
        ([str(runs), "-o", "figure"], "cannot write figure: its name must end in .png, .svg or .pdf"),
        (
            [str(runs), "-o", str(tmp_path / "no" / "figure.png")],
            f"cannot write {tmp_path / 'no' / 'figure.png'}: the folder {tmp_path / 'no'} does not exist",
        ),
    ):
        line = refused(capsys, *out, *arguments)
        assert line.startswith(f"Error: {words}")
    assert not (tmp_path / "figure.png").exists()
    (tmp_path / "folder.png").mkdir()
    assert "folder.png" in refused(capsys, str(runs), "-o", str(tmp_path / "folder.png"))


def damage(folder: Path) -> list[Path]:
    """A damaged file of each kind, in a folder each."""
    files = [folder / "events" / "events.out.tfevents.1.host", folder / "csv" / "metrics.csv"]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(range(127, 256)) * 3)
    return files


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in damage(tmp_path):
        assert refused(capsys, str(file.parent)).startswith(f"Error: {file} cannot be read: ")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    run = write_csv(tmp_path / "run", {"hd/lr-SGD": [0.1, 0.2], "step": [1, 2]})
    file = run / "metrics.csv"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    (curves,) = load([run])
    assert curves.rates["SGD"] == ([1, 2], [0.1, 0.2])


def test_a_damaged_run_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = damage(tmp_path / "runs")
    write_csv(tmp_path / "runs" / "sound", {"step": [1, 2], "lr-SGD": [0.1, 0.2]})
    with pytest.warns(UserWarning, match=r"cannot be read: .*\. This run is left out") as caught:
        (run,) = load([tmp_path / "runs"])
    assert run.rates["SGD"] == ([1, 2], [0.1, 0.2])
    assert [str(warning.message).partition(" ")[0] for warning in caught] == sorted(map(str, files))
    with pytest.raises(SystemExit, match="0"):
        main(["plot", str(tmp_path / "runs"), "-o", str(tmp_path / "figure.png")])
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / 'figure.png'}: 1 run, 1 curves\n"
    assert [line.partition(" cannot")[0] for line in output.err.splitlines()] == sorted(f"Warning: {f}" for f in files)


def test_an_event_file_is_drawn_up_to_its_damage_with_a_warning_and_as_far_as_it_goes_without(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:  # type: ignore[no-untyped-call]
        for step in range(20):
            writer.add_scalar("hd/lr-SGD", 0.5, step)  # type: ignore[no-untyped-call]
    (file,) = tmp_path.iterdir()
    intact = file.read_bytes()
    (curves,) = load([tmp_path])
    assert curves.rates["SGD"][0] == list(range(20))
    start = intact.index(b"hd/lr-SGD", len(intact) // 2)
    event = intact.rindex(b"\t", 0, start) - 12  # its first field is the time, after a length and a checksum
    for damage, place in (("length", event), ("checksum", event + 8), ("content", start), ("its checksum", start + 20)):
        spoiled = bytearray(intact)
        spoiled[place] ^= 255
        file.write_bytes(spoiled)
        with pytest.warns(UserWarning, match=rf"is damaged. It is drawn up to byte \d+ of {len(intact)}") as caught:
            (curves,) = load([tmp_path])
        assert 5 < len(curves.rates["SGD"][0]) < 15, damage
        assert [warning.filename for warning in caught] == [__file__]
    file.write_bytes(intact[:event] + bytes(500))  # as some file systems leave it after a crash
    with pytest.warns(UserWarning, match="is damaged"):
        load([tmp_path])
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for end in range(event, len(intact)):
            file.write_bytes(intact[:end])
            counts.append(len(load([tmp_path])[0].rates["SGD"][0]))
    assert sorted(set(counts)) == list(range(counts[0], 20))
    assert sorted(counts) == counts


def test_help_and_missing_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in ((["--help"], 0), (["plot", "--help"], 0), (["plot"], 2), (["plot", "--unknown"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code
        output = capsys.readouterr()
        assert "plot" in output.out + output.err
        assert "Traceback" not in output.err


# ---------------------------------------------------------------------- what is drawn


def test_lines_hold_exactly_what_was_logged(runs: Path) -> None:
    drawn = panels(plot([runs / "sgd", runs / "adam", runs / "plain"]))
    assert list(drawn) == ["learning rate", "loss", "cosine"]
    sgd, adam, plain = runs / "sgd" / "v2", runs / "adam" / "v10", runs / "plain" / "v1"

    rates = named(drawn["learning rate"])
    assert rates.keys() == {"sgd/v2", "adam/v10 · Adam/body", "adam/v10 · Adam/head", "plain/v1"}
    assert_holds(rates["sgd/v2"], logged(sgd, tag("lr", "SGD")))
    assert_holds(rates["plain/v1"], logged(plain, "lr-SGD"))
    for group in ("Adam/body", "Adam/head"):
        assert_holds(rates[f"adam/v10 · {group}"], logged(adam, tag("lr", group)))
    assert drawn["learning rate"].get_yscale() == "log"

    losses = named(drawn["loss"])
    assert losses.keys() == {"sgd/v2", "adam/v10", "plain/v1"}
    assert_holds(losses["adam/v10"], logged(adam, "loss"))
    assert_holds(losses["plain/v1"], logged(plain, "loss"))
    assert_holds(thin(drawn["loss"], losses["sgd/v2"]), logged(sgd, "loss"))
    assert drawn["loss"].get_yscale() == "log"

    cosines = named(drawn["cosine"])
    assert cosines.keys() == {"sgd/v2", "adam/v10 · Adam/body", "adam/v10 · Adam/head"}
    assert_holds(thin(drawn["cosine"], cosines["sgd/v2"]), logged(sgd, tag("cosine", "SGD")))
    for group in ("Adam/body", "Adam/head"):
        line = thin(drawn["cosine"], cosines[f"adam/v10 · {group}"])
        assert_holds(line, logged(adam, tag("cosine", group)))
    assert drawn["cosine"].get_ylim() == (-1, 1)
    for axes, lines in ((drawn["loss"], losses), (drawn["cosine"], cosines)):
        line = lines["sgd/v2"]
        assert line.get_linewidth() > 2 * thin(axes, line).get_linewidth()
    assert len({axes.get_xlim() for axes in drawn.values()}) == 1


def test_means_are_those_of_the_numbers_around() -> None:
    values = np.random.default_rng(0).normal(size=240).clip(-1, 1).tolist()
    values[50] = math.nan
    (axes,) = figure([Curves("run", {}, cosines={"SGD": (range(240), values)})]).axes
    (line,) = named(axes).values()
    expected = [
        math.nan
        if i == 50
        else np.mean([values[j] for j in range(max(i - 6, 0), min(i + 7, 240)) if math.isfinite(values[j])])
        for i in range(240)
    ]
    np.testing.assert_allclose(np.asarray(line.get_ydata()), expected, rtol=1e-12)


def test_the_legend_is_outside_of_the_panels(runs: Path) -> None:
    curves = load([runs])
    long = [Curves(f"{'folder/' * 12}{run.name}", run.rates, run.loss, run.cosines) for run in curves]
    for drawn in (figure(curves), figure(long), figure(curves * 5)):
        drawn.draw_without_rendering()
        (legend,) = drawn.legends
        box = legend.get_window_extent()
        assert not any(box.overlaps(bbox) for axes in drawn.axes if (bbox := axes.get_tightbbox()) is not None)
        assert drawn.bbox.x0 <= box.x0 < box.x1 <= drawn.bbox.x1
        assert drawn.bbox.y0 <= box.y0 < box.y1 <= drawn.bbox.y1
        assert all(axes.get_window_extent().height > 100 for axes in drawn.axes)  # pixels at 100 dpi
        labels = [text.get_text() for text in legend.get_texts()]
        assert set(labels) == {label for axes in drawn.axes for label in named(axes)}


def test_lines_differ_without_colour_and_in_lightness(runs: Path) -> None:
    drawn = figure([Curves(f"run {i}", {"SGD": ([1, 2], [0.1, 0.2])}) for i in range(40)])
    lines = list(named(drawn.axes[0]).values())
    assert len({(line.get_marker(), str(line._dash_pattern)) for line in lines}) == 40  # type: ignore[attr-defined]
    lightness = [np.dot(to_rgb(line.get_color()), (0.299, 0.587, 0.114)) for line in lines[:8]]
    assert min(abs(a - b) for a, b in itertools.pairwise(lightness)) > 0.1
    (axes,) = drawn.axes
    assert [text.get_fontsize() for text in (axes.xaxis.label, axes.yaxis.label)] == [8, 8]
    assert {text.get_fontsize() for text in (*axes.get_xticklabels(), *drawn.legends[0].get_texts())} == {7}


def test_no_state_is_left_in_matplotlib(runs: Path, tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    save(plot([runs]), tmp_path / "figure.SVG")
    assert (tmp_path / "figure.SVG").read_text().startswith("<?xml")
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []
    with pytest.raises(PlotError, match="must end in"):
        check_file(tmp_path / "figure.gif")


def test_numbers_that_cannot_be_drawn_are_gaps(tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    run = write_csv(
        tmp_path / "run",
        {
            "step": [1, 2, 3, 4, 5, "nan", ""],
            "hd/lr-SGD/pg1": [0.1, 0, 1e300, -0.1, 0.2, 1, 1],
            "hd/lr-SGD/pg2": [0, 0, 0, 0, 0, 0, 0],
            "hd/cosine-SGD": [nan, inf, -1, 1, "", 1, 1],
            "loss": [1e308, 2, nan, 1, -inf, 1, 1],
            "note": ["a", "", "b", "c", "d", "e", "f"],
        },
    )
    drawn = panels(plot([run]))
    for name, steps, values in (
        ("learning rate", [1, 2, 3, 4, 5], [0.1, nan, nan, nan, 0.2]),
        ("loss", [1, 2, 3, 4, 5], [nan, 2, nan, 1, nan]),
        ("cosine", [1, 2, 3, 4], [nan, nan, 0, 0]),
    ):
        (line,) = named(drawn[name]).values()
        np.testing.assert_array_equal(line.get_xdata(), steps)
        np.testing.assert_array_equal(line.get_ydata(), values)
        alone = [1, 5] if name == "learning rate" else [2, 4] if name == "loss" else []
        assert set(alone) <= {steps[i] for i in np.flatnonzero(np.asarray(line.get_markevery()))}
    assert named(drawn["cosine"]).keys() == named(drawn["loss"]).keys() == {"run"}
    assert drawn["loss"].get_yscale() == "log"
    save(plot([run]), tmp_path / "figure.png")
    assert plt.imread(tmp_path / "figure.png").std() > 0.01

    (axes,) = figure([Curves("run", {"SGD": ([1, 2], [0, 0])}, ([1, 2], [1, 0]))]).axes
    assert (axes.get_ylabel(), axes.get_yscale()) == ("loss", "linear")
    for nothing in ([], [Curves("run", {"SGD": ([1], [0])}, ([1], [nan]), {"SGD": ([], [])})]):
        with pytest.raises(PlotError, match="nothing to draw"):
            figure(nothing)


def test_any_name_is_shown(tmp_path: Path) -> None:
    names = {"_run": "run", "__": "--", "a$b$c^": "a$b$c^", "50 %": "50 %", "ε {x} \\alpha": "ε {x} \\alpha"}
    drawn = figure([Curves(name, {"SGD": ([1, 2], [0.1, 0.2])}) for name in names])
    for suffix in ("png", "svg", "pdf"):
        save(drawn, tmp_path / f"figure.{suffix}")
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == list(names.values())


def test_without_a_name_the_groups_are_shown() -> None:
    rates = {"Adam/body": ([1, 2], [0.1, 0.2]), "Adam/head": ([1, 2], [0.3, 0.4])}
    (axes,) = figure([Curves("", rates)]).axes
    assert list(named(axes)) == ["Adam/body", "Adam/head"]


# ---------------------------------------------------------------------- what is read


def test_the_callbacks_rates_are_read_before_those_of_a_monitor(tmp_path: Path) -> None:
    steps = [10, 20]
    theirs: dict[str, Any] = {"lr-SGD": [7, 7], "lr-SGD-momentum": [0.9, 0.9]}
    ours: dict[str, Any] = {"hd/lr-SGD": [0.3, 0.4], "hd/cosine-SGD": [0.1, -0.1], "hd/log10_lr-SGD": [1, 1]}
    write_csv(tmp_path / "v10", {"step": steps, **theirs})
    write_csv(tmp_path / "v9", {"step": steps, **theirs, **ours})
    read = load([tmp_path])
    assert [run.name for run in read] == ["v9", "v10"]
    assert [dict(run.rates) for run in read] == [{"SGD": (steps, [0.3, 0.4])}, {"SGD": (steps, [7, 7])}]
    assert [dict(run.cosines) for run in read] == [{"SGD": (steps, [0.1, -0.1])}, {}]


def test_the_loss_is_found_or_chosen(tmp_path: Path) -> None:
    rate: dict[str, Any] = {"step": [1, 2], "lr-SGD": [0.1, 0.1]}
    for columns, found in (
        ({"loss": [1, 2], "train_loss": [3, 4]}, [1, 2]),
        ({"loss_step": [1, 2], "train/loss": [3, 4]}, [3, 4]),
        ({"a": [5, 6], "g_loss": [1, 2], "val_loss": [3, 4]}, [1, 2]),
        ({"accuracy": [1, 2]}, None),
    ):
        (run,) = load([write_csv(tmp_path / "run", {**rate, **columns})])
        assert (None if run.loss is None else run.loss[1]) == found
    other = write_csv(tmp_path / "other", {**rate, "val/loss": [1, 2], "loss": [3, 4]})
    drawn = panels(plot([tmp_path / "run", other], loss="val/loss"))
    assert list(drawn) == ["learning rate", "val/loss"]
    assert list(named(drawn["val/loss"])) == ["other"]
    assert list(panels(plot([other]))) == ["learning rate", "loss"]


def test_a_run_without_rates_is_compared_with_others(tmp_path: Path) -> None:
    write_csv(tmp_path / "a", {"step": [1, 2], "loss": [1, 2]})
    write_csv(tmp_path / "b", {"step": [1, 2], "loss": [1, 2], "lr-SGD": [0.1, 0.2]})
    write_csv(tmp_path / "c", {"step": [1, 2], "accuracy": [1, 2]})
    drawn = panels(plot([tmp_path]))
    assert [list(named(axes)) for axes in drawn.values()] == [["b"], ["a", "b"]]


def test_a_run_that_was_named_and_has_nothing_to_draw_is_left_out_with_a_warning(tmp_path: Path) -> None:
    good = write_csv(tmp_path / "good", {"step": [1, 2], "lr-SGD": [0.1, 0.2]})
    empty = write_csv(tmp_path / "empty", {"step": []})
    other = write_csv(tmp_path / "other", {"step": [1, 2], "accuracy": [1, 2]})
    with pytest.warns(UserWarning, match=r"has logged nothing to draw\. It is left out$") as caught:
        assert [run.name for run in load([good, empty, other])] == ["good"]
    assert [str(warning.message).partition(" ")[0] for warning in caught] == [str(empty), str(other)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [run.name for run in load([tmp_path])] == ["good"]  # these two were not named


def test_a_run_is_read_once_and_called_by_its_folder(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs / "sgd")
    assert [run.name for run in load([".", runs / "sgd" / "v2", "v2"])] == ["v2"]
    assert [run.name for run in load(["../sgd", "../plain"])] == ["sgd/v2", "plain/v1"]
    nested = write_csv(runs.parent / "nested" / "below", {"step": [1], "lr-SGD": [1]}).parent
    write_csv(nested, {"step": [1], "lr-SGD": [1]})
    assert [run.name for run in load([nested])] == ["nested", "nested/below"]


def test_a_resumed_run_goes_on_from_where_it_was_resumed(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:  # type: ignore[no-untyped-call]
        for step in [*range(10), *range(5, 8)]:
            writer.add_scalar("hd/lr-SGD", 2.0**step, step)  # type: ignore[no-untyped-call]
    write_csv(tmp_path, {"step": [1, 2, 3, 2, 3], "hd/lr-SGD": [9] * 5, "loss": [1, 2, 3, 4, 5]})
    (run,) = load([tmp_path])
    assert run.rates["SGD"] == (list(range(8)), [2.0**step for step in range(8)])  # of the event files
    assert run.loss == ([1, 2, 3], [1, 4, 5])


def test_no_point_is_dropped(tmp_path: Path) -> None:
    with SummaryWriter(tmp_path) as writer:  # type: ignore[no-untyped-call]
        for step in range(10_100):
            writer.add_scalar("hd/lr-SGD", step + 1, step)  # type: ignore[no-untyped-call]
    (run,) = load([tmp_path])
    assert run.rates["SGD"] == (list(range(10_100)), list(range(1, 10_101)))


def test_trainings_that_share_a_folder_are_told_apart_by_the_prefixes_of_their_loggers(tmp_path: Path) -> None:
    hds = [HypergradientDescent(), HypergradientDescent()]
    for prefix, hd in zip(["a", "a-b/2"], hds, strict=True):
        logger = TensorBoardLogger(tmp_path, "run", "v1", prefix=prefix)
        make_trainer(tmp_path, hd, logger=logger, log_every_n_steps=1, limit_train_batches=len(prefix) * 10).fit(
            Reference()
        )
    monitored: dict[str, Any] = {"a-lr-SGD": [0.1, 0.2], "a-lr-SGD-momentum": [0.9, 0.9], "a-loss": [3, 4]}
    write_csv(tmp_path / "csv", {"step": [1, 2], **monitored, "hd/cosine-SGD/x-lr-y": [0, 0]})
    without, csv_run, *read = load([tmp_path])
    assert [run.name for run in read] == ["run/v1 · a", "run/v1 · a-b/2"]
    assert (without.name, csv_run.name, without.rates) == ("csv", "csv · a", {})
    assert (csv_run.rates, csv_run.loss) == ({"SGD": ([1, 2], [0.1, 0.2])}, ([1, 2], [3, 4]))
    for run, hd in zip(read, hds, strict=True):
        assert run.rates["SGD"][1] == pytest.approx(hd.lrs["lr-SGD"], rel=1e-6)
        assert run.loss is not None
        assert len(run.loss[0]) == len(run.rates["SGD"][0]) == len(run.cosines["SGD"][0]) + 1
    assert [run.loss is not None for run in load([tmp_path / "run"], loss="a-b/2-loss")] == [False, True]
    assert [run.loss is not None for run in load([tmp_path / "run"], loss="loss")] == [True, True]


def test_a_callback_draws_its_training_as_the_command_draws_the_logs(tmp_path: Path) -> None:
    hd = HypergradientDescent()
    with pytest.raises(RuntimeError, match="there is nothing to plot: no step of an optimizer was tuned yet"):
        hd.plot()
    logger = CSVLogger(tmp_path, "run", "v1")
    make_trainer(tmp_path, hd, logger=logger, log_every_n_steps=1, limit_train_batches=60).fit(Reference())
    own, read = panels(hd.plot()), panels(plot([tmp_path]))
    assert list(own) == list(read) == ["learning rate", "loss", "cosine"]
    for name in own:
        (mine,), (theirs,) = named(own[name]).values(), named(read[name]).values()
        np.testing.assert_array_equal(mine.get_xdata(), theirs.get_xdata())
        mine_y, theirs_y = (np.asarray(line.get_ydata(), dtype=float) for line in (mine, theirs))
        np.testing.assert_allclose(mine_y, theirs_y, rtol=1e-6)
    groups = HypergradientDescent(scope="group", log_every_n_steps=0)
    make_trainer(tmp_path, groups, limit_train_batches=60).fit(Reference(body_and_head))
    assert list(named(panels(groups.plot())["learning rate"])) == ["Adam · body", "Adam · head"]
