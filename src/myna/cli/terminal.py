"""The two streams that commands print to.

Owns the rich consoles: results on standard output, progress and errors on standard error.
"""

from rich.console import Console

console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)
