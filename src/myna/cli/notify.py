"""Notification: telling somebody that a run has ended, by a command or a webhook they named.

Owns both ways of sending. No shell is involved, nothing is sent that was not asked for, and a
notification that fails is a warning: it never changes how a run ended.
"""

import json
import shlex
import subprocess
import urllib.error
import urllib.request
from typing import Any

SECONDS = 20
"""Longest wait for either."""


def notify(target: str, message: dict[str, Any]) -> str | None:
    """Send `message` as JSON; None, or a sentence that says why it did not arrive.

    A target that begins with http:// or https:// gets a POST, every other one is a command line,
    which gets the JSON on its standard input.
    """
    body = json.dumps(message, ensure_ascii=False).encode()
    try:
        if target.startswith(("http://", "https://")):
            request = urllib.request.Request(
                target, data=body, headers={"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=SECONDS):
                return None
        done = subprocess.run(
            shlex.split(target), input=body, timeout=SECONDS, capture_output=True, check=False
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            return f"notify: the command ended with {done.returncode}" + (
                f": {said[-1][:200]}" if said else ""
            )
    except (OSError, ValueError, subprocess.SubprocessError, urllib.error.URLError) as error:
        return f"notify: {error}"
    return None
