"""The warning of `--trust-remote-code`, printed before any such code can run.

Owns its text only; the loaders of `models` are handed the permission itself.
"""

from rich.console import Console


def warn_of_remote_code(source: str | None, console: Console) -> None:
    """Say whose Python files are about to run."""
    console.print("[yellow]warning:[/] ", end="")
    console.print(
        f"--trust-remote-code runs Python files of {source or 'the base'} as you.",
        markup=False,
        soft_wrap=True,
    )
