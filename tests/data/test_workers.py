"""Workers: results in order, errors as they are, and none that outlives the process it is of."""

import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from myna.config_file import load_config
from myna.data.workers import AHEAD, CannotStart, Workers
from myna.errors import ConfigError

SOURCE = Path(__file__).parents[2] / "src"


def describe(task: object) -> str:
    return f"the task {task}"


def test_results_come_in_the_order_of_the_tasks() -> None:
    # The first takes longest, so that the others are done before it.
    with Workers(2, time.sleep, describe) as workers:
        assert list(workers.map([0.3, 0.0, 0.0, 0.1])) == [None] * 4
    with Workers(3, partial(operator.mul, 2), describe) as workers:
        assert list(workers.map(range(50))) == [2 * number for number in range(50)]


def test_only_a_few_tasks_are_taken_ahead() -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with Workers(2, partial(operator.add, 1), describe) as workers:
        for done, result in enumerate(workers.map(tasks()), start=1):
            assert result == done
            assert len(taken) <= done + 2 * AHEAD


def test_an_error_of_the_job_is_raised_here() -> None:
    with Workers(2, partial(operator.truediv, 1), describe) as workers:
        results = workers.map([1, 2, 0, 4])
        assert [next(results), next(results)] == [1.0, 0.5]
        with pytest.raises(RuntimeError, match=r"a worker failed:\n(.|\n)*ZeroDivisionError"):
            next(results)


def test_an_error_of_ours_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as expected:
        load_config(tmp_path / "none.yaml")
    with Workers(1, load_config, describe) as workers, pytest.raises(ConfigError) as error:
        list(workers.map([tmp_path / "none.yaml"]))
    assert str(error.value) == str(expected.value)


def test_a_worker_that_dies_is_an_error_in_words() -> None:
    with Workers(2, os._exit, describe) as workers, pytest.raises(ConfigError) as error:
        list(workers.map([7]))
    assert str(error.value) == (
        "A process that encodes rows ended with exit code 7 while it had the task 7.\n"
        "  Repeat the command: rows encoded so far are kept."
    )


def test_a_worker_that_is_killed_says_what_kills() -> None:
    with Workers(1, signal.raise_signal, describe) as workers, pytest.raises(ConfigError) as error:
        list(workers.map([signal.SIGKILL]))
    assert str(error.value) == (
        "A process that encodes rows ended by signal 9 (SIGKILL) while it had the task 9.\n"
        "  That is what a system does when memory runs out: free some. "
        "Repeat the command: rows encoded so far are kept."
    )


def test_what_cannot_be_handed_over_is_said() -> None:
    with pytest.raises(CannotStart, match="lambda"):
        Workers(1, lambda task: task, describe)
    with pytest.raises(CannotStart, match="no_such_function"):
        Workers(1, _Unknown(), describe)


class _Unknown:
    """Pickles to the name of a function that does not exist."""

    def __reduce__(self) -> str:
        return "no_such_function"

    def __call__(self, task: object) -> object:
        return task


def test_what_a_job_prints_does_not_mix_with_results(capfd: pytest.CaptureFixture[str]) -> None:
    with Workers(1, print, describe) as workers:
        assert list(workers.map(["hello"])) == [None]
    assert "hello" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_workers_end_with_the_process_that_is_killed() -> None:
    program = (
        "import time, sys\n"
        "from myna.data.workers import Workers\n"
        "workers = Workers(2, time.sleep, str)\n"
        "print(*(process.pid for process in workers._processes), flush=True)\n"
        "list(workers.map([0.5] * 1000))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
