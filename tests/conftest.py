"""What holds for every test: nothing is written to the user's cache, and an audit hook watches.

The hook notes what no code of ours may do, whoever asks for it: a program started through a shell,
a class looked up by unpickling in a call of ours, a connection to another machine. A test during
which it was seen fails.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

PACKAGE = str(Path(__file__).parents[1] / "src" / "myna")
OWN_PROCESSES = f"{PACKAGE}/data/workers.py"
_SEEN: list[str] = []
_OWN_MACHINE = ("127.", "::1", "localhost", "0.0.0.0")


def _is_ours() -> str | None:
    """The innermost line of the package on this thread's stack."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "multiprocessing" in name or "concurrent" in name or name == OWN_PROCESSES:
            return None  # what processes of one program tell each other
        if name.startswith(PACKAGE):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in ("pickle.find_class", "os.system", "subprocess.Popen", "socket.connect"):
        return
    if event == "subprocess.Popen":
        words = arguments[1] if isinstance(arguments[1], (list, tuple)) else [arguments[1]]
        if not (str(words[0]).endswith("/sh") and "-c" in map(str, words)):
            return
    if event == "socket.connect":
        address = arguments[1]
        if not isinstance(address, tuple) or str(address[0]).startswith(_OWN_MACHINE):
            return
    if where := _is_ours():
        _SEEN.append(f"{event} {arguments!r:.200} at {where}")


sys.addaudithook(_watch)


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile(
        "ours",
        deadline=None,
        derandomize=config.option.markexpr == "not full",
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("ours")


@pytest.fixture(autouse=True)
def _audited() -> Iterator[None]:
    _SEEN.clear()
    yield
    assert not _SEEN, _SEEN


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYNA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
