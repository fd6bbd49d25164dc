"""The command line: ``python -m lightning_hd plot RUN_DIR...``."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

from lightning_hd.reporting import plotting
from lightning_hd.reporting.runs import PlotError, load


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: The arguments after ``python -m lightning_hd``; ``None``: those of this process.
    """
    try:
        import matplotlib  # noqa: F401
        import typer
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is missing: {plotting.INSTALL}")
    app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.callback()
    def lightning_hd() -> None:
        """Learning rates that tune themselves while the model trains."""

    @app.command()
    def plot(
        runs: Annotated[
            list[str],  # not Path, which makes the present folder of an empty name
            typer.Argument(metavar="RUN_DIR", help="Folders of runs. The folders below are searched as well."),
        ],
        output: Annotated[
            Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write: .png, .svg or .pdf.")
        ] = Path("lightning_hd.png"),
        loss: Annotated[
            str | None,
            typer.Option(metavar="TAG", help="Tag of the loss.  [default: the training loss, if a run has logged it]"),
        ] = None,
        width: Annotated[float, typer.Option(metavar="INCHES", help="Width of the figure.", min=1.0, max=100.0)] = (
            plotting.COLUMN
        ),
    ) -> None:
        """Draw learning rates, loss and cosines of runs, from event files of TensorBoard and logs of CSVLogger.

        The thick lines of the cosines, and of losses with 100 points or more, are running means.
        """
        typer.echo(_draw(runs, output, loss, width))

    app(args=arguments, prog_name="python -m lightning_hd")


def _draw(runs: Sequence[str], output: Path, loss: str | None, width: float) -> str:
    """Draw runs, and say what was drawn. Warnings and errors are one line each."""
    try:
        plotting.check_file(output)
        with warnings.catch_warnings(record=True) as caught:
            curves = load(runs, loss)
        for warning in caught:
            print(f"Warning: {warning.message}", file=sys.stderr)
        figure = plotting.figure(curves, width)
        plotting.save(figure, output)
    except (PlotError, OSError) as error:
        _fail(str(error))
    lines = sum(not str(line.get_label()).startswith("_") for axes in figure.axes for line in axes.lines)
    return f"{output}: {len(curves)} {'run' if len(curves) == 1 else 'runs'}, {lines} curves"


def _fail(message: str) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
