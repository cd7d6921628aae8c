"""Look the pinned dependencies up in the databases of known holes.

    python tools/audit.py [--if-possible]

Owns what the answer means: exit 1 where a pinned version has a known hole, 3 where nobody could be
asked (no network, no advisory service), which is 0 with `--if-possible`. Asking is pip-audit's; it
is installed into `.audit/`, apart from what it looks at.
"""

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PINNED = ROOT / "constraints.txt"
ENVIRONMENT = ROOT / ".audit"
FOUND, NOBODY_ASKED = 1, 3


def verdict(report: dict[str, Any] | None, said: str, *, if_possible: bool) -> tuple[int, str]:
    """Exit code and words for what pip-audit reported; None where it came to no report."""
    if report is None:
        last = (said.strip().splitlines() or ["no answer"])[-1]
        words = f"the advisory databases could not be asked, nothing is known: {last}"
        return 0 if if_possible else NOBODY_ASKED, words
    packages = report["dependencies"]
    skipped = [entry["name"] for entry in packages if "skip_reason" in entry]
    if len(skipped) == len(packages):  # as of an index that keeps files, and no advisories
        return verdict(None, "no package is known there", if_possible=if_possible)
    holes = [
        f"{entry['name']} {entry['version']}: {hole['id']}, "
        f"mended in {', '.join(hole['fix_versions']) or 'no version'}"
        for entry in packages
        for hole in entry.get("vulns", [])
    ]
    asked = f"{len(packages) - len(skipped)} pinned packages"
    unknown = f"\n  not known there: {', '.join(skipped)}" if skipped else ""
    if holes:
        lines = "\n  ".join(holes)
        return FOUND, f"{len(holes)} known holes in {asked}:\n  {lines}{unknown}"
    return 0, f"no known hole in {asked}{unknown}"


def ask() -> tuple[dict[str, Any] | None, str]:
    """pip-audit's report, or None and what it said instead."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*install, "pip-audit"], capture_output=True, text=True)
    if done.returncode:
        return None, done.stderr
    # Pinned versions only: nothing is resolved, so nothing is downloaded.
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    done = subprocess.run(
        [python, "-m", "pip_audit", "--requirement", PINNED, *options],
        capture_output=True,
        text=True,
    )
    try:
        return json.loads(done.stdout), done.stderr
    except json.JSONDecodeError:
        return None, done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--if-possible", action="store_true", help="exit 0 where nobody is asked")
    code, words = verdict(*ask(), if_possible=parser.parse_args().if_possible)
    print(words)
    sys.exit(code)


if __name__ == "__main__":
    main()
