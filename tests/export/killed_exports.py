"""Program of test_killed.py: merges and exports in forked processes, killed at random moments.

Prints one JSON object: how many trials ended with nothing under the final name, with all of it,
with half of it, and what was left beside it after the next try.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM

from myna.export.gguf import export_model
from myna.export.merge import merge
from myna.export.origin import open_origin


def in_a_process(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def whole_model(folder: Path) -> bool:
    AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return (folder / "README.md").is_file()


def whole_gguf(file: Path) -> bool:
    return len(gguf.GGUFReader(file).tensors) == 21


def main(adapter: str, place: Path, trials: int) -> dict[str, int]:
    texts = [list(range(3, 40))]
    jobs: dict[str, tuple[Callable[[Path], object], Callable[[Path], bool]]] = {
        "merged": (
            lambda out: merge(open_origin(adapter, needs_adapter=True), out, texts),
            whole_model,
        ),
        "model.gguf": (
            lambda out: export_model(open_origin(adapter, needs_adapter=True), out, "q8_0"),
            whole_gguf,
        ),
    }
    found = dict.fromkeys(("trials", "absent", "whole", "half", "left over"), 0)
    for name, (work, is_whole) in jobs.items():
        folder = place / f"{name}-trials"
        folder.mkdir()
        out = folder / name
        started = time.monotonic()
        assert os.waitpid(in_a_process(lambda: work(out)), 0)[1] == 0  # noqa: B023
        seconds = time.monotonic() - started
        assert is_whole(out)
        draw = random.Random(name)
        for _ in range(trials):
            remove(out)
            pid = in_a_process(lambda: work(out))  # noqa: B023
            time.sleep(draw.uniform(0.2, 1.1) * seconds)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            found["trials"] += 1
            if not out.exists():
                found["absent"] += 1
            else:
                found["whole" if is_whole(out) else "half"] += 1
        remove(out)
        assert os.waitpid(in_a_process(lambda: work(out)), 0)[1] == 0  # noqa: B023
        found["left over"] += len(list(folder.glob(".*")))
    return found


def remove(out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))))
