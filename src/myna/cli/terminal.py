"""The two streams that commands print to, and what must not get into them.

Owns the rich consoles: results on standard output, progress and errors on standard error.
"""

import re

from rich.console import Console

console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")


def harmless(text: str) -> str:
    """`text` without characters that a terminal obeys, which no model may write."""
    return _CONTROL.sub("\ufffd", text)
