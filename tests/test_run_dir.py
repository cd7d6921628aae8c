"""The run directory: one process at a time, files whole or absent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from myna.errors import ConfigError, RunLockedError, StorageError
from myna.run_dir import (
    RunDir,
    file_written_aside,
    newest_run,
    next_free,
    write_file,
    written_aside,
)


def test_a_second_process_is_refused_and_told_which_one_holds_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    attempt = (
        "from pathlib import Path\nfrom myna.run_dir import RunDir\n"
        f"with RunDir(Path({str(run.path)!r})).locked(): pass\n"
    )
    with run.locked():
        other = subprocess.run([sys.executable, "-c", attempt], capture_output=True, text=True)
    assert f"process {os.getpid()} is training in this directory" in other.stderr
    assert "--fresh" in other.stderr
    with run.locked():  # free again
        pass


def test_lock_in_one_process_too(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with run.locked(), pytest.raises(RunLockedError), run.locked():
        pass


def test_a_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with written_aside(target) as aside:
        (aside / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), written_aside(target) as aside:
        (aside / "a").write_text("new")
        raise ZeroDivisionError
    assert (target / "a").read_text() == "old"
    with written_aside(target) as aside:
        (aside / "b").write_text("new")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_write_file_into_a_missing_folder_names_the_path(tmp_path: Path) -> None:
    path = tmp_path / "none" / "file"
    with pytest.raises(StorageError, match="could not be written: No such file or directory"):
        write_file(path, "x")


def test_an_unwritable_place_is_an_error_with_a_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="Choose another place with --output"),
        RunDir(tmp_path / "file" / "run").locked(),
    ):
        pass


def test_what_a_killed_trial_of_the_place_left_is_no_obstacle(tmp_path: Path) -> None:
    for name in (".probe.tmp-0", ".probe.tmp-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("probe")
    with RunDir(tmp_path).locked():
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_next_free_counts_on(tmp_path: Path) -> None:
    path = tmp_path / "job"
    assert next_free(path) == path
    path.mkdir()
    assert next_free(path).name == "job-2"
    (tmp_path / "job-2").mkdir()
    assert next_free(path).name == "job-3"


def test_newest_run_is_the_one_whose_adapter_came_last(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished run here"):
        newest_run(tmp_path)
    for number, name in enumerate(["b", "a", "unfinished"]):
        (tmp_path / name / ("adapter" if name != "unfinished" else "checkpoints")).mkdir(
            parents=True
        )
        os.utime(tmp_path / name, (number, number))
    os.utime(tmp_path / "b" / "adapter", (10, 10))
    os.utime(tmp_path / "a" / "adapter", (20, 20))
    assert newest_run(tmp_path).path.name == "a"


def test_a_large_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.gguf"
    with file_written_aside(path) as aside:
        aside.write_bytes(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"
    with pytest.raises(ValueError, match="halfway"), file_written_aside(path) as aside:
        aside.write_bytes(b"sec")
        raise ValueError("halfway")
    with pytest.raises(StorageError) as caught, file_written_aside(path) as aside:
        raise OSError(28, "No space left on device")
    assert str(caught.value) == (
        f"{path}: could not be written: [Errno 28] No space left on device."
    )
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]
