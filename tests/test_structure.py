"""The shape of the code: direction of imports, what each module says of itself, what it loads."""

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "myna"
ORDER = ["errors", "installation", "config", "config_file", "run_dir", "device", "data", "ops"]
ORDER += ["models", "lora", "distributed", "training", "inference", "export", "evaluation"]
ORDER += ["report", "studio", "demo", "cli", "api"]
"""Parts in the order data passes through them; a part imports itself and what stands before it."""
APART = [("data", "models"), ("models", "data"), ("inference", "export"), ("export", "inference")]
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "myna":
            names = [f"myna.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("myna.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_backwards(path: Path) -> None:
    own = part_of(path)
    if own in ("__init__", "__main__"):
        return
    for other in imported_parts(path):
        assert ORDER.index(other) <= ORDER.index(own), f"{own} imports {other}"
        assert (own, other) not in APART, f"{own} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_owns(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    assert len(text) > 80, "a paragraph, not a line"
    assert text.split("\n")[0].rstrip().endswith((".", ":", "?")) or "\n" in text


def test_no_module_is_named_after_nothing() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "common", "helpers", "misc"}


def test_every_module_of_the_tests_mirrors_a_folder_of_the_package_or_is_known() -> None:
    folders = {path.parent.relative_to(PACKAGE) for path in MODULES}
    # docs/no-silent-mistakes.md is shown there, defect by defect, through whole commands.
    folders |= {Path("benchmarks"), Path("no_silent_mistakes")}
    for path in (Path(__file__).parent).rglob("test_*.py"):
        assert path.parent.relative_to(Path(__file__).parent) in folders


def test_help_and_import_load_no_torch_and_take_under_half_a_second() -> None:
    code = (
        "import sys, contextlib, io\nimport myna\nfrom myna.cli.main import app\n"
        "with contextlib.redirect_stdout(io.StringIO()) as text, "
        "contextlib.suppress(SystemExit): app(['--help'])\n"
        "assert 'train' in text.getvalue()\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'matplotlib'}\n"
        "heavy |= {'starlette', 'uvicorn', 'gguf'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.strip() == "[]"
    # Processor time: what the clock says depends on who else is at work.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
