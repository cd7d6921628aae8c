"""An installation that was interrupted says exactly what is missing, at every phase of it.

The environments are made of the packages that the tests run with: a folder of links to them, with
some left out, emptied or cut short as an installer leaves them that is killed. Python runs without
its own packages (`-S`), so that the folder is all there is.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from myna.installation import faults

SOURCE = Path(__file__).parents[1] / "src"
PACKAGES = Path(sysconfig.get_paths()["purelib"])

Environment = Callable[..., Path]


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """Links to all packages there are; those that are named are copied, to be spoilt."""

    def make(*copied: str) -> Path:
        root = tmp_path / "packages"
        root.mkdir()
        for path in PACKAGES.iterdir():
            if path.name not in copied:
                (root / path.name).symlink_to(path)
            elif path.is_dir():
                shutil.copytree(path, root / path.name, ignore=shutil.ignore_patterns("*.pyc"))
        return root

    return make


def folder_of(name: str) -> Path:
    """The metadata of a package."""
    own = next(iter(importlib.metadata.distributions(name=name)))
    return Path(str(own.locate_file(f"{name}-{own.version}.dist-info")))


def doctor(root: Path, command: str = "doctor") -> tuple[int, str]:
    """Exit code and errors of `myna doctor` where only `root` is installed."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "myna", command],
        env=os.environ
        | {"PYTHONPATH": f"{SOURCE}{os.pathsep}{root}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


def said(*lines: str, install: str = "", repair: str = "") -> tuple[int, str]:
    """What it has to end with and say."""
    text = "error: this installation of myna is not complete:\n"
    text += "".join(f"  {line}\n" for line in lines) + "  Mend it with\n"
    if install:
        text += f"    python -m pip install {install}\n"
    if repair:
        text += f"    python -m pip install --force-reinstall --no-deps {repair}\n"
    return 2, text


def version(name: str) -> str:
    return importlib.metadata.version(name)


def test_all_is_there() -> None:
    assert faults() == []


def test_before_anything_is_installed(tmp_path: Path) -> None:
    assert doctor(tmp_path) == said(
        "myna's own metadata are missing, so that what it needs is not known", repair='"myna"'
    )


def test_before_any_package_that_it_needs(environment: Environment, tmp_path: Path) -> None:
    own = folder_of("myna")
    shutil.copytree(own, tmp_path / own.name)
    code, text = doctor(tmp_path)
    needed = [line for line in importlib.metadata.requires("myna") or [] if "extra" not in line]
    assert code == 2 and text.count(" is missing\n") == len(needed) >= 15
    assert all(f'"{line}"' in text for line in needed)


@pytest.mark.parametrize("command", ["doctor", "train"])
def test_before_the_package_of_the_command_line(environment: Environment, command: str) -> None:
    """Whatever is asked for, there is no traceback."""
    root = environment()
    for path in ("typer", folder_of("typer").name):
        (root / path).unlink()
    needed = next(line for line in importlib.metadata.requires("myna") or [] if "typer" in line)
    assert doctor(root, command) == said("typer is missing", install=f'"{needed}"')


def test_before_a_package_that_commands_need(environment: Environment) -> None:
    root = environment()
    for path in ("peft", folder_of("peft").name):
        (root / path).unlink()
    needed = next(line for line in importlib.metadata.requires("myna") or [] if "peft" in line)
    assert doctor(root) == said("peft is missing", install=f'"{needed}"')
    code, text = doctor(root, "train")
    assert code == 2 and "Traceback" not in text


def test_before_a_package_that_a_package_needs(environment: Environment) -> None:
    root = environment()
    for path in ("markupsafe", folder_of("markupsafe").name):
        (root / path).unlink()
    assert doctor(root) == said(
        "MarkupSafe, which Jinja2 needs, is missing", install='"MarkupSafe>=2.0"'
    )


def test_while_files_are_copied(environment: Environment) -> None:
    """Its metadata are not there yet."""
    root = environment()
    (root / folder_of("jinja2").name).unlink()
    code, text = doctor(root)
    assert code == 2 and "  jinja2 is missing\n" in text


def test_before_its_list_of_files_is_written(environment: Environment) -> None:
    info = folder_of("jinja2").name
    root = environment("jinja2", info)
    (root / info / "RECORD").unlink()
    (root / info / "INSTALLER").unlink()
    number = version("jinja2")
    assert doctor(root) == said(
        f"jinja2 {number} was not installed to its end: the list of its files is missing",
        repair=f'"Jinja2=={number}"',
    )


@pytest.mark.parametrize("cut", [False, True])
def test_after_some_files_were_lost(environment: Environment, cut: bool) -> None:
    root = environment("jinja2", folder_of("jinja2").name)
    file = root / "jinja2" / "sandbox.py"
    if cut:
        file.write_bytes(file.read_bytes()[:1000])
    else:
        file.unlink()
    code, text = doctor(root)
    assert code == 2
    assert f"  jinja2 {version('jinja2')} is there in part: 1 of its " in text
    assert "files missing or cut short, the first is jinja2/sandbox.py\n" in text
    assert text.endswith(f'--no-deps "Jinja2=={version("jinja2")}"\n')


def test_while_a_package_is_removed_for_a_newer_one(environment: Environment) -> None:
    root = environment("jinja2", folder_of("jinja2").name)
    shutil.rmtree(root / "jinja2")
    code, text = doctor(root)
    assert code == 2 and " of its " in text and "the first is jinja2/__init__.py\n" in text


def test_before_a_newer_one_takes_the_place_of_an_old_one(environment: Environment) -> None:
    info = folder_of("jinja2").name
    root = environment("jinja2", info)
    metadata = root / info / "METADATA"
    metadata.write_text(
        metadata.read_text().replace(f"Version: {version('jinja2')}", "Version: 3.0")
    )
    code, text = doctor(root)
    assert code == 2 and "  jinja2 is too old: 3.0, and at least 3.1.6 is needed\n" in text


@pytest.mark.full
def test_files_that_are_whole_and_cannot_be_imported(environment: Environment) -> None:
    root = environment("jinja2", folder_of("jinja2").name)
    start = root / "jinja2" / "__init__.py"
    start.write_text("raise OSError('libfoo.so: cannot open')\n" + start.read_text())
    code, text = doctor(root)
    assert code == 2
    assert (
        f"jinja2 {version('jinja2')} cannot be imported: OSError: libfoo.so: cannot open\n" in text
    )
