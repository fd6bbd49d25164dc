"""Reads learning rates, losses and cosines of runs, from event files of TensorBoard and from files of CSVLogger."""

import csv
import math
import os
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from lightning_hd.reporting.names import PREFIX

Curve: TypeAlias = tuple[Sequence[float], Sequence[float]]
"""Steps and values."""

EVENTS, CSV = "events.out.tfevents.*", "metrics.csv"
LOSSES = ("loss", "train_loss", "train/loss", "loss_step", "train_loss_step")


class PlotError(ValueError):
    """There is nothing to draw, or the figure cannot be written. The message is one line."""


@dataclass(frozen=True)
class Curves:
    """What is drawn of one run. Each curve is a pair of sequences of equal length, which are steps and values.

    Args:
        name: The name of the run in the legend.
        rates: The learning rates of each parameter group, by its name.
        loss: The loss.
        cosines: The cosines of each parameter group, or of each optimizer, by its name.
        loss_name: The name of the axis of the loss, if it is the same for all runs.
    """

    name: str
    rates: Mapping[str, Curve]
    loss: Curve | None = None
    cosines: Mapping[str, Curve] = field(default_factory=dict)
    loss_name: str = "loss"


def load(runs: Sequence[Path | str], loss: str | None = None) -> list[Curves]:
    """Read the runs in some folders, and in the folders below them.

    A run with a file that cannot be read is left out, with a warning. An event file that is damaged further on is read
    up to there, with a warning.

    Args:
        runs: Folders with event files of TensorBoard or with ``metrics.csv`` of Lightning's ``CSVLogger``.
        loss: The tag of the loss, with or without the prefix of its logger; ``None``: the first of ``loss``,
            ``train_loss``, ``train/loss``, ``loss_step`` and ``train_loss_step`` that a run has logged, else the first
            tag that ends in ``loss``.

    Returns:
        The curves of each run.

    Raises:
        PlotError: A folder or the tag does not exist, no run can be read, or none has logged a learning rate.
    """
    found = {run: _find(run) for run in runs}
    read = _read_all(dict.fromkeys(chain.from_iterable(found.values())))
    parts = list(_parts(read))
    if loss is not None and not any(loss.removeprefix(prefix) in own for _, prefix, own in parts):
        there = sorted({tag for tags in read.values() for tag in tags}, key=natural)
        raise PlotError(f"no run has logged {loss!r}; the tags are: {', '.join(there)}")
    root = os.path.commonpath([folder.parent for folder in read]) if read else ""
    curves: dict[Path, list[Curves]] = {folder: [] for folder in read}
    for folder, prefix, own in parts:
        name = " · ".join(filter(None, (folder.relative_to(root).as_posix(), prefix[:-1])))
        run = _select(name, own, loss and loss.removeprefix(prefix))
        curves[folder] += [run] if run.rates or run.loss or run.cosines else []
    if not any(run.rates for own in curves.values() for run in own):
        where = ", ".join(map(str, runs))
        raise PlotError(
            f"no run has logged a learning rate in {where}: looked for the tags {PREFIX}lr-NAME, "
            "of HypergradientDescent, and lr-NAME, of LearningRateMonitor"
        )
    for argument, folders in found.items():
        if not any(curves.get(folder, True) for folder in folders):  # others than these were told of
            warnings.warn(f"{argument} has logged nothing to draw. It is left out", stacklevel=2)
    return [run for own in curves.values() for run in own]


def _read_all(folders: Iterable[Path]) -> dict[Path, dict[str, Curve]]:
    """All scalars of all runs. A warning names those that cannot be read, an error if there is no other."""
    read, unreadable = dict[Path, dict[str, Curve]](), list[PlotError]()
    for folder in folders:
        try:
            read[folder] = _read(folder)
        except PlotError as error:
            unreadable.append(error)
    if unreadable and not read:
        raise unreadable[0]
    for why in unreadable:
        warnings.warn(f"{why}. This run is left out", stacklevel=3)
    return read


def _find(run: Path | str) -> list[Path]:
    """The folders of all runs in a folder and below it, as absolute paths."""
    if not str(run):
        raise PlotError("the name of a folder is empty")
    folder = Path(run)
    if not folder.is_dir():
        raise PlotError(f"{folder} is not a folder" if folder.exists() else f"folder does not exist: {folder}")
    files = [file for pattern in (EVENTS, CSV) for file in folder.rglob(pattern) if file.is_file()]
    if not files:
        raise PlotError(f"no runs in {folder}: looked for {EVENTS} and {CSV}, in the folders below as well")
    folders = {Path(os.path.abspath(file)).parent for file in files}  # noqa: PTH100  # symbolic links keep their names
    return sorted(folders, key=lambda folder: natural(str(folder)))


def natural(name: str) -> list[tuple[int, str]]:
    """A key to sort by: ``version_2`` comes before ``version_10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read(folder: Path) -> dict[str, Curve]:
    """All scalars of a run. If both kinds of files hold a tag, the event files count."""
    numbers: dict[str, Curve] = {}
    for source in (_csv(folder), _events(folder)):
        tags: dict[str, tuple[list[int], list[float]]] = {}
        for tag, step, value in source:
            steps, values = tags.setdefault(tag, ([], []))
            while steps and steps[-1] >= step:  # the run was resumed from there
                steps.pop()
                values.pop()
            steps.append(step)
            values.append(value)
        numbers |= tags
    return numbers


def _csv(folder: Path) -> Iterator[tuple[str, int, float]]:
    file = folder / CSV
    if not file.is_file():
        return
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            for row in csv.DictReader(lines):
                numbers = {tag: number for tag, text in row.items() if (number := _number(text)) is not None}
                step = numbers.pop("step", math.nan)
                if math.isfinite(step):
                    yield from ((tag, int(step), value) for tag, value in numbers.items())
    except (csv.Error, UnicodeDecodeError) as error:
        raise PlotError(f"{file} cannot be read: {error}") from error


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):  # the cell is empty, or has no name in the header
        return None


def _events(folder: Path) -> Iterator[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    files = list(folder.glob(EVENTS))
    for file in files:
        _check_events(file)
    if files:
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()  # 0: keeps every point
        for tag in events.Tags()[SCALARS]:
            for event in events.Scalars(tag):
                yield tag, event.step, event.value


def _check_events(file: Path) -> None:
    """Warn if an event file is damaged, because TensorBoard reads it up to there without a word.

    A last event that is not whole yet is no damage: a training is writing it.

    Raises:
        PlotError: The file holds no event. Every file begins with one.
    """
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    size = file.stat().st_size  # before it is read, because it may grow
    whole = sum(16 + len(event) for event in RawEventFileLoader(str(file)).Load())  # with the length and two checksums
    if size and not whole:
        raise PlotError(f"{file} cannot be read: it holds no event")
    if size < whole + 12:
        return
    with file.open("rb") as rest:
        rest.seek(whole)
        head = rest.read(12)
    length, checksum = struct.unpack("<QI", head)
    if masked_crc32c(head[:8]) != checksum or whole + 16 + length <= size:
        warnings.warn(f"{file} is damaged. It is drawn up to byte {whole} of {size}", stacklevel=6)  # in `load`


def _parts(read: Mapping[Path, Mapping[str, Curve]]) -> Iterator[tuple[Path, str, dict[str, Curve]]]:
    """The trainings that have logged into each folder: the prefix of each one's logger, or none, and its curves."""
    starts = (rf"(.*?-)??{PREFIX}lr-", r"([^/]*?-)??lr-")  # of the callback, and of LearningRateMonitor
    for folder, tags in read.items():
        found = {match[1] or "" for tag in tags for start in starts if (match := re.match(start, tag))}
        longest_first = sorted(found, key=len, reverse=True)
        owners = {tag: next(filter(tag.startswith, longest_first), "") for tag in tags}
        for prefix in sorted(set(owners.values()), key=natural):
            yield folder, prefix, {tag.removeprefix(prefix): tags[tag] for tag in tags if owners[tag] == prefix}


def _select(name: str, tags: Mapping[str, Curve], loss: str | None) -> Curves:
    rates = _named(tags, f"{PREFIX}lr-")
    if not rates:
        others = {tag: tags[tag] for tag in tags if not tag.endswith(("-momentum", "-weight_decay"))}
        rates = _named(others, "lr-")
    if loss is None:
        there = [tag for tag in LOSSES if tag in tags] or [tag for tag in tags if tag.endswith("loss")]
        loss = there[0] if there else "loss"
    cosines = _named(tags, f"{PREFIX}cosine-")
    return Curves(name, rates, tags.get(loss), cosines, "loss" if loss in LOSSES else loss)


def _named(tags: Mapping[str, Curve], prefix: str) -> dict[str, Curve]:
    """The curves whose tags have this prefix, by the rest of the tag."""
    found = {tag.removeprefix(prefix): curve for tag, curve in tags.items() if tag.startswith(prefix)}
    return dict(sorted(found.items(), key=lambda item: natural(item[0])))
