"""The command line: ``python -m lightning_hd plot RUN_DIR...``."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

from lightning_hd.reporting import plotting as plot
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
        _fail(f"{error.name} is missing: {plot.INSTALL}")
    app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.callback()
    def lightning_hd() -> None:
        """Learning rates that tune themselves while the model trains."""

    @app.command("plot")
    def draw(
        runs: Annotated[
            list[Path],
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
            plot.COLUMN
        ),
    ) -> None:
        """Draw learning rates, loss and cosines of runs, from event files of TensorBoard and logs of CSVLogger.

        The thick lines of the cosines, and of losses with 100 points or more, are running means.
        """
        try:
            plot.check_file(output)
            curves = load(runs, loss)
            figure = plot.figure(curves, width)
            plot.save(figure, output)
        except (PlotError, OSError) as error:
            _fail(str(error))
        lines = sum(not str(line.get_label()).startswith("_") for axes in figure.axes for line in axes.lines)
        typer.echo(f"{output}: {len(curves)} {'run' if len(curves) == 1 else 'runs'}, {lines} curves")

    app(args=arguments, prog_name="python -m lightning_hd")


def _fail(message: str) -> NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
