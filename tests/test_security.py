"""No pickle, no shell, no eval, no network nobody asked for: read in the source, and watched."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "myna"
MODULES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "torch.save",
    "numpy.load",
    "np.load",
    "pty.spawn",
}
READS_PICKLED_WEIGHTS = "models/pickled_weights.py"
"""Reads pickles of others: it scans them first, and says `weights_only=True`."""
OWN_PROCESSES = "data/workers.py"
"""Pickles what it sends to processes that it started, over pipes that nobody else has."""
MAY_PICKLE = (READS_PICKLED_WEIGHTS, OWN_PROCESSES)


def parsed() -> Iterator[tuple[str, ast.Module]]:
    for path in MODULES:
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8"))


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults_of(name: str, tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        where = f"{name} line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in FORBIDDEN_MODULES and name not in MAY_PICKLE:
                    yield f"{where}: import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in FORBIDDEN_MODULES and name not in MAY_PICKLE:
                yield f"{where}: from {node.module}"
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if called in FORBIDDEN_CALLS:
                yield f"{where}: {called}()"
            if "shell" in given:
                yield f"{where}: {called}(shell=…)"
            if called == "torch.load":
                only = given.get("weights_only")
                safe = isinstance(only, ast.Constant) and only.value is True
                if not safe or name != READS_PICKLED_WEIGHTS:
                    yield f"{where}: torch.load"
            trust = given.get("trust_remote_code")
            if isinstance(trust, ast.Constant) and trust.value is True:
                yield f"{where}: trust_remote_code=True"


def test_the_source_has_no_pickle_no_shell_and_no_eval() -> None:
    assert [fault for name, tree in parsed() for fault in faults_of(name, tree)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "yaml.load(text)",
        "load(model, trust_remote_code=True)",
    ],
)
def test_the_reading_sees_what_it_is_for(line: str) -> None:
    assert list(faults_of("cli/train.py", ast.parse(line)))


def test_importing_opens_no_connection_and_starts_no_program() -> None:
    """Every module of the package, in a process that may do neither."""
    names = [
        "myna." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in MODULES
        if path.name not in ("__init__.py", "__main__.py")
    ]
    watched = f"""
import sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "os.system") or (
        event == "subprocess.Popen" and "uname" not in str(arguments[1])
    ):
        print("SEEN", event, arguments, file=sys.stderr)
sys.addaudithook(hook)
import importlib
for name in {names!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SEEN" not in done.stderr, done.stderr
