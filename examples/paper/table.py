"""The table of final values."""

from collections.abc import Iterable, Mapping, Sequence

from paper.settings import EXPERIMENTS, Run
from paper.training import Measured, by_epoch

HEAD = ("", "highest rate", "rate", "training loss", "validation loss", "accuracy")


def make_table(measured: Mapping[Run, Measured]) -> str:
    """A row for each run of an experiment: means over the last epoch, and validation after it."""
    run = next(iter(measured))
    width = f", {run.width:g} times the channels" if run.width != 1 else ""
    title = f"{EXPERIMENTS[run.experiment].title}{width}: {run.images:,} images of {run.data}, {run.epochs} epochs."
    return f"{title}\n\n{markdown(HEAD, [_row(run, each) for run, each in measured.items()])}"


def _row(run: Run, measured: Measured) -> list[str]:
    rate, loss = by_epoch(measured.rates, run)[-1], by_epoch(measured.losses, run)[-1]
    cells = [run.name, f"{max(measured.rates):.2g}", f"{rate:.2g}", f"{loss:.3f}"]
    if not measured.val_losses:
        return [*cells, "–", "–"]
    return [*cells, f"{measured.val_losses[-1]:.3f}", f"{measured.val_accuracies[-1]:.1%}"]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is to the left, and all others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
