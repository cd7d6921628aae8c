"""What a command loads before it answers, and the garbage collector meanwhile."""

import gc
import subprocess
import sys

import pytest

from myna.cli.loading import collector_resting


def test_the_collector_rests_and_works_again_whatever_happens() -> None:
    assert gc.isenabled()
    with pytest.raises(ValueError, match="inside"), collector_resting():
        assert not gc.isenabled()
        raise ValueError("inside")
    assert gc.isenabled() and gc.get_freeze_count() > 0
    gc.disable()
    try:
        with collector_resting():
            pass
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()
        gc.unfreeze()


def test_chat_loads_no_library_that_it_does_not_use() -> None:
    """They take seconds, and a person waits for the first word."""
    code = (
        "import sys, myna.cli.chat, myna.inference.chat\n"
        "unused = {'datasets', 'pandas', 'pyarrow', 'matplotlib', 'jieba', 'sacrebleu'}\n"
        "print(sorted(unused & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
