"""The command: ``python examples/paper``."""

import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paper import data, figures, plan, sensitivity, table
from paper.settings import EXPERIMENTS, Run
from paper.training import Measured, is_made, load, train, write

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class Part(str, Enum):
    """What can be asked for."""

    LOGREG = "logreg"
    MLP = "mlp"
    VGG = "vgg"
    SENSITIVITY = "sensitivity"


@app.command()
def main(
    parts: Annotated[list[Part] | None, typer.Argument(help="What to make.  [default: all]")] = None,
    data_dir: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder with files in the format of MNIST or CIFAR-10, or with folders that have them. Repeatable.  "
            "[default: Fashion-MNIST of Debian's package, else digits]",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Where figures, tables and runs go.")] = Path("runs/paper"),
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes: few images, few epochs, a narrow VGG.")] = False,
    small: Annotated[bool, typer.Option("--small", help="What the README shows: less of MLP and VGG.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each experiment.  [default: the paper's]")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="How many to train with, and to validate.")] = None,
    width: Annotated[
        float | None, typer.Option(min=0.001, help="Channels of the VGG, over those of VGG-16.  [default: 1]")
    ] = None,
    threshold: Annotated[float, typer.Option(help="The training loss that the sensitivity is about.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Of initial parameters, order of the images and dropout.")] = 0,
) -> None:
    """Make the paper's experiments: figures, the table of final values, and the sensitivity to α₀ and β.

    What is finished is kept: the same command goes on where it was interrupted.
    """
    if quick and small:
        raise typer.BadParameter("it is one or the other", param_hint="--quick / --small")
    size = plan.QUICK if quick else plan.SMALL if small else plan.PAPER
    if epochs:
        size = replace(size, epochs=dict.fromkeys(EXPERIMENTS, epochs), grid_epochs=epochs)
    if images:
        size = replace(size, images=dict.fromkeys(EXPERIMENTS, images))
    if width:
        size = replace(size, width=width)
    try:
        gray, large = data.find_images(data_dir or [])
    except data.DataError as error:
        raise typer.BadParameter(str(error), param_hint="--data-dir") from error
    folder = out / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    quiet()
    tables = []
    try:
        for part in parts or list(Part):
            used = large if part is Part.VGG else gray
            if part is Part.SENSITIVITY:
                measured = make(part, plan.grid_runs(size, used, threshold, seed), used, folder)
                figure, text = sensitivity.draw(measured), sensitivity.make_table(measured)
            else:
                measured = make(part, plan.paper_runs(part.value, size, used, seed), used, folder)
                figure, text = figures.draw(measured), table.make_table(measured)
            figure.savefig(out / f"{part.value}.png", dpi=figures.DPI)
            tables.append(text)
    except (KeyboardInterrupt, SystemExit):  # the latter is what a Trainer makes of the former
        typer.echo("\ninterrupted; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    report = "\n\n".join(tables)
    write(out / "table.md", f"{report}\n")
    typer.echo(f"\n{report}\n\nfigures and table.md are in {out}")


def make(part: Part, runs: Sequence[Run], images: data.Images, folder: Path) -> dict[Run, Measured]:
    """Make the runs that are missing, and read all."""
    missing = [run for run in runs if not is_made(run, folder)]
    total = sum(run.length for run in missing)
    with tqdm(total=total, desc=part.value, unit="it", smoothing=0.0, disable=not missing) as bar:
        for run in missing:
            bar.set_postfix_str(run.name)
            end = bar.n + run.length
            train(run, images, folder, bar.update)
            bar.update(end - bar.n)
    return {run: load(run, folder) for run in runs}


def quiet() -> None:
    """The progress bar is enough."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


if __name__ == "__main__":
    app(prog_name="python examples/paper")
