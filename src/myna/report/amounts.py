"""Amounts as a person reads them: durations, bytes, moments.

Owns the wording only.
"""

import time


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: int) -> str:
    """`531 MB`, `2.4 GB`."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def moment(seconds: float) -> str:
    """`2026-11-25 02:09`, in the time of this machine."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
