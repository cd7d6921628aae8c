"""The audit of dependencies fails for a known hole, and never takes silence for an answer."""

import importlib.util
from pathlib import Path

PATH = Path(__file__).parents[1] / "tools" / "audit.py"
SPEC = importlib.util.spec_from_file_location("audit", PATH)
assert SPEC is not None and SPEC.loader is not None
audit = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(audit)

# As pip-audit writes it.
WHOLE = {"name": "jinja2", "version": "3.1.6", "vulns": []}
HOLE = {"id": "PYSEC-1", "fix_versions": ["2.1"], "aliases": [], "description": ""}
BROKEN = {"name": "urllib3", "version": "2.0", "vulns": [HOLE]}
UNKNOWN = {"name": "torch", "skip_reason": "not found in the index"}


def test_no_known_hole() -> None:
    report = {"dependencies": [WHOLE, UNKNOWN], "fixes": []}
    words = "no known hole in 1 pinned packages\n  not known there: torch"
    assert audit.verdict(report, "", if_possible=False) == (0, words)


def test_a_known_hole_fails_in_any_case() -> None:
    report = {"dependencies": [WHOLE, BROKEN], "fixes": []}
    words = "1 known holes in 2 pinned packages:\n  urllib3 2.0: PYSEC-1, mended in 2.1"
    assert audit.verdict(report, "", if_possible=False) == (1, words)
    assert audit.verdict(report, "", if_possible=True) == (1, words)


def test_where_nobody_could_be_asked_nothing_is_known() -> None:
    said = "WARNING: retrying\nERROR: no such host\n"
    words = "the advisory databases could not be asked, nothing is known: ERROR: no such host"
    assert audit.verdict(None, said, if_possible=False) == (3, words)
    assert audit.verdict(None, said, if_possible=True) == (0, words)


def test_an_index_that_knows_no_package_was_not_asked() -> None:
    """As a mirror answers that keeps files and no advisories."""
    words = "the advisory databases could not be asked, nothing is known: no package is known there"
    report = {"dependencies": [UNKNOWN, UNKNOWN], "fixes": []}
    assert audit.verdict(report, "", if_possible=False) == (3, words)
    assert audit.verdict(report, "", if_possible=True) == (0, words)
