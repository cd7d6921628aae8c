"""Where a run lies, and what is said of one that is finished. Loads no torch.

Owns the default of `output`, and the few lines that end `myna train` and `myna demo`.
"""

from pathlib import Path

from rich.console import Console

from myna.cli.resumption import changed_inputs, changed_settings
from myna.config_file import ResolvedConfig
from myna.data.files import content_hash, content_sha256
from myna.data.sources import find_sources, source_name
from myna.run_dir import RUNS, RunDir


def output_of(resolved: ResolvedConfig) -> Path:
    """The run directory that the settings name, or runs/<stem of the YAML or data file>."""
    if resolved.config.output is not None:
        return Path(resolved.config.output).expanduser().absolute()
    name = resolved.path.stem if resolved.path else source_name(resolved.config.data[0])
    return (RUNS / name).absolute()


def short(path: Path) -> str:
    """As a person in this folder would type it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def say_if_finished(resolved: ResolvedConfig, console: Console) -> bool:
    """Whether these settings name a run that is finished, which is then said; touches nothing.

    Raises ConfigError where the run there had other settings or other data.
    """
    directory = RunDir(output_of(resolved))
    if not (directory.adapter.is_dir() and directory.config.is_file()):
        return False
    config = resolved.with_output(directory.path).config
    changed_settings(directory, config)
    if all(isinstance(entry, str) and Path(entry).is_file() for entry in config.data):
        sources, _ = find_sources(config.data)
        digest = content_hash([content_sha256(source.path) for source in sources])
        changed_inputs(directory, {"data": digest})
    console.print(f"{short(directory.path)} is finished; nothing was changed.")
    show_result(directory, console)
    return True


def show_result(directory: RunDir, console: Console) -> None:
    """Where the adapter is and what to do with it."""
    run = short(directory.path)
    report = short(directory.report) if directory.report.is_file() else f"myna report {run}"
    console.print(
        f"The adapter is in {short(directory.adapter)}\n"
        f"  myna chat {run}      talk to it\n"
        f"  {report}      how it went, as a page for a browser"
    )
