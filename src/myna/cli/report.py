"""`myna report`: one run as a page for a browser.

Owns where the page goes, and that `myna train` ends with its pictures: a finished run is finished
whether they can be drawn or not. What stands on the page is `myna.report.html`'s.
"""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from myna.cli.place import short
from myna.cli.runs import run_state
from myna.errors import ConfigError
from myna.report.html import run_page
from myna.report.run_record import read_run
from myna.run_dir import RunDir, write_file


def run(source: Path, output: Path | None, *, console: Console) -> None:
    """Write the page of a run and say where it is."""
    page = write_report(RunDir(source), output)
    console.print(f"The page is {page}", soft_wrap=True, markup=False)


def write_report(directory: RunDir, output: Path | None = None) -> Path:
    """Write report.html, or the page to `output`; its path.

    Raises ConfigError for a folder that is no run, StorageError for a file of it that is damaged
    and for a page that cannot be written.
    """
    if not directory.path.is_dir():
        raise ConfigError(
            f"{directory.path}: no such run directory.\n  `myna runs` lists the runs in runs/."
        )
    record = read_run(directory)
    found = run_state(directory)
    if found is not None:
        state: str = found.state
    else:  # a copy without its lock
        state = "finished" if directory.adapter.is_dir() else "stopped"
    page = directory.report if output is None else output
    path = short(directory.path.absolute())
    write_file(page, run_page(record, state=state, path=path))
    return page


def draw_pictures(directory: RunDir, console: Console) -> None:
    """Draw loss.png and report.html of a run that has ended; what fails is said in a line."""
    from myna.report.plots import plot_loss
    from myna.training.events import read_events

    def loss_plot() -> None:
        plot_loss(read_events(directory.events), directory.loss_plot)

    def report() -> None:
        write_report(directory)

    pictures: dict[Path, Callable[[], None]] = {
        directory.loss_plot: loss_plot,
        directory.report: report,
    }
    for path, draw in pictures.items():
        try:
            draw()
        except Exception as error:  # the adapter is there; no picture is worth an error
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            console.print(
                f"warning: {short(path)} was not drawn: {reason}", soft_wrap=True, markup=False
            )
