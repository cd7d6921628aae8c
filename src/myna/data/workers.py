"""Workers: processes that share one job, fed and emptied through pipes.

Owns how they start, how they end and what is said when one dies. Each is a fresh Python, not a
fork: a fork would inherit the locks of torch's and the tokenizers' threads, held for ever. A worker
ends when its standard input does, hence with the process that started it, however that ends. What
the job is, is handed in; what passes through the pipes is pickled by this package and read by it
alone.
"""

import contextlib
import gc
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from myna.errors import ConfigError

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 3
"""Tasks per worker that are done or waiting before the result of the oldest is taken."""

_COMMAND = "from myna.data.workers import serve; serve()"


class CannotStart(Exception):
    """The job cannot be handed to another process; the text says why."""


class Workers(Generic[Task, Result]):
    """`number` processes that each compute `job(task)`; a context manager.

    Args:
        number: of processes.
        job: pickled once for each worker.
        describe: a task in words, for the error when a worker dies over it.

    Raises:
        CannotStart: `job` cannot be pickled, or a worker cannot read it.
    """

    def __init__(
        self, number: int, job: Callable[[Task], Result], describe: Callable[[Task], str]
    ) -> None:
        self._describe = describe
        try:
            payload = pickle.dumps(job, protocol=5)
        except Exception as error:  # anything can go wrong in the __reduce__ of a foreign class
            raise CannotStart(f"{type(error).__name__}: {error}") from error
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        try:
            for _ in range(number):
                self._processes.append(_start())
            for process in self._processes:
                _send(process, payload)
            for process in self._processes:
                refused = _receive(process)
                if refused is not None:
                    raise CannotStart(refused)
                self._idle.put(process)
        except (EOFError, OSError) as error:
            self._stop()
            raise CannotStart(f"a worker did not start: {error}") from error
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Self:
        """They wait for tasks."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End them, whatever they do."""
        self._stop()

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """The results in the order of the tasks, which are taken a few ahead.

        Raises what `job` raised, and ConfigError where a worker died.
        """
        waiting: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(len(self._processes), thread_name_prefix="worker") as threads:
            try:
                for task in tasks:
                    waiting.append(threads.submit(self._ask, task))
                    if len(waiting) >= AHEAD * len(self._processes):
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._stop()  # so that no thread waits for an answer
                raise

    def _ask(self, task: Task) -> Result:
        process = self._idle.get()
        try:
            _send(process, pickle.dumps(task, protocol=5))
            done, value = _receive(process)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise ConfigError(self._obituary(process, task)) from error
        finally:
            self._idle.put(process)
        if not done:
            raise value
        result: Result = value
        return result

    def _obituary(self, process: "subprocess.Popen[bytes]", task: Task) -> str:
        try:
            code = process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = 0
        how = f"with exit code {code}"
        if code < 0:
            how = f"by signal {-code} ({signal.Signals(-code).name})"
        killed = code == -signal.SIGKILL
        return (
            f"A process that encodes rows ended {how} while it had {self._describe(task)}.\n"
            + ("  That is what a system does when memory runs out: free some. " if killed else "  ")
            + "Repeat the command: rows encoded so far are kept."
        )

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                # What a dead process did not read cannot be flushed.
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()


def _start() -> "subprocess.Popen[bytes]":
    package = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([package, *filter(None, sys.path)]),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        # -P: a file of the working directory must not be taken for a package.
        [sys.executable, "-P", "-c", _COMMAND],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C is for this process, which ends the workers
    )


def _send(process: "subprocess.Popen[bytes]", payload: bytes) -> None:
    assert process.stdin is not None, "started with a pipe"
    process.stdin.write(payload)
    process.stdin.flush()


def _receive(process: "subprocess.Popen[bytes]") -> Any:
    assert process.stdout is not None, "started with a pipe"
    return pickle.load(process.stdout)


def serve() -> None:
    """What a worker does: read the job, then answer each task, until nothing comes any more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    tasks = sys.stdin.buffer

    def answer(value: Any) -> None:
        answers.write(value if isinstance(value, bytes) else pickle.dumps(value, protocol=5))
        answers.flush()

    try:
        job = pickle.load(tasks)
    except EOFError:
        return
    except Exception as error:
        answer(f"{type(error).__name__}: {error}")
        return
    answer(None)
    # A task makes very many objects and hardly a cycle among them: looking for cycles after each
    # few hundred, through all that was ever imported, takes a fifth of the time.
    gc.freeze()
    gc.disable()
    while True:
        try:
            task = pickle.load(tasks)
        except EOFError:
            return
        try:
            reply = pickle.dumps((True, job(task)), protocol=5)
        except Exception as error:
            reply = pickle.dumps((False, _portable(error)), protocol=5)
        del task
        gc.collect(0)
        try:
            answer(reply)
        except BrokenPipeError:
            return


def _portable(error: Exception) -> Exception:
    """The error, or the same in words where it is not ours or cannot be pickled."""
    if type(error).__module__.startswith("myna."):
        with contextlib.suppress(Exception):  # a constructor may want other arguments
            if str(pickle.loads(pickle.dumps(error))) == str(error):
                return error
    return RuntimeError("a worker failed:\n" + "".join(traceback.format_exception(error)))
