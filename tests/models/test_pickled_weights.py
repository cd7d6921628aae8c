import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from myna.errors import ConfigError, StorageError
from myna.models.pickled_weights import cache_folder, convert_pickled_weights, scan_pickle


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MYNA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def replace_pickle(path: Path, program: bytes) -> None:
    """Put `program` in place of data.pkl in the torch file at `path`."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, program if name.endswith("data.pkl") else content)


class Canary:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_a_program_is_refused_unrun(
    protocol: int, tmp_path: Path, cache: Path
) -> None:
    canary = tmp_path / "canary"
    program = pickle.dumps({"w": Canary(canary)}, protocol=protocol)
    pickle.loads(program)
    assert canary.is_file()  # it would work
    canary.unlink()

    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2)}, path)
    replace_pickle(path, program)
    with pytest.raises(ConfigError) as caught:
        convert_pickled_weights(tmp_path, [path.name])
    called = "something through opcode STACK_GLOBAL" if protocol == 4 else f"{os.name}.system"
    assert f"{path}: its pickle calls {called} (byte " in str(caught.value)
    assert str(caught.value).endswith(
        "which weights do not need: loading it could run a program.\n"
        "  It was not loaded. Use a safetensors copy of the model from a source you trust."
    )
    assert not canary.exists()
    assert not cache.exists()


def test_one_bad_shard_stops_all_before_the_first_is_read(tmp_path: Path, cache: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "one.bin")
    torch.save({"b": torch.nn.Linear(2, 2)}, tmp_path / "two.bin")  # a whole module: needs code
    with pytest.raises(ConfigError, match=r"two\.bin: its pickle calls torch\.nn\.modules"):
        convert_pickled_weights(tmp_path, ["one.bin", "two.bin"])
    assert not cache.exists()


def test_conversion_keeps_names_dtypes_and_bits(tmp_path: Path, cache: Path) -> None:
    shared = torch.randn(4, 3)
    first = {
        "w": torch.randn(5, 7, dtype=torch.bfloat16),
        "transposed": torch.randn(3, 5).T,
        "tied.a": shared,
        "tied.b": shared,
        "row": shared[1],
        "count": torch.tensor(3),
    }
    second = {"half": torch.randn(3).half(), "parameter": torch.nn.Parameter(torch.ones(2))}
    torch.save(first, tmp_path / "1.bin")
    torch.save(second, tmp_path / "2.bin")
    folder = convert_pickled_weights(tmp_path, ["1.bin", "2.bin"])
    assert folder.is_relative_to(cache)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    for name, source in zip(names, (first, second), strict=False):
        tensors = load_file(folder / name)
        assert set(tensors) == set(source)
        for key, tensor in tensors.items():
            assert tensor.dtype == source[key].dtype
            assert tensor.equal(source[key])


def test_converted_once_and_again_when_the_source_changes(tmp_path: Path, cache: Path) -> None:
    source = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, source)
    folder = convert_pickled_weights(tmp_path, [source.name])
    shard = folder / "model-00001-of-00001.safetensors"
    time = shard.stat().st_mtime_ns
    assert convert_pickled_weights(tmp_path, [source.name]) == folder
    assert shard.stat().st_mtime_ns == time
    torch.save({"a": torch.zeros(2)}, source)
    other = convert_pickled_weights(tmp_path, [source.name])
    assert other != folder
    assert load_file(other / shard.name)["a"].equal(torch.zeros(2))


def test_a_conversion_cut_short_goes_on(tmp_path: Path, cache: Path) -> None:
    for number in (1, 2):
        torch.save({f"w{number}": torch.full((2,), number)}, tmp_path / f"{number}.bin")
    folder = convert_pickled_weights(tmp_path, ["1.bin", "2.bin"])
    index = folder / "model.safetensors.index.json"
    whole = index.read_text("utf-8")
    first = folder / "model-00001-of-00002.safetensors"
    time = first.stat().st_mtime_ns
    index.unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert convert_pickled_weights(tmp_path, ["1.bin", "2.bin"]) == folder
    assert first.stat().st_mtime_ns == time
    assert index.read_text("utf-8") == whole


def test_files_that_are_no_weights(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "w.bin"
    path.write_text("version https://git-lfs.github.com/spec/v1", "utf-8")
    with pytest.raises(ConfigError) as caught:
        scan_pickle(path)
    assert str(caught.value) == (
        f"{path}: not a zip file as torch >= 1.6 writes it; cut short, or of an older form.\n"
        "  Fetch it again, or a safetensors copy of the model."
    )
    torch.save({"state_dict": {"a": torch.ones(1)}}, path)
    with pytest.raises(ConfigError, match="not a flat mapping of names to tensors, as weights are"):
        convert_pickled_weights(tmp_path, [path.name])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("b/other.pkl", b"")
    with pytest.raises(ConfigError, match=r"holds the pickles \['a/data\.pkl', 'b/other\.pkl'\]"):
        scan_pickle(path)
    torch.save({"a": torch.ones(1)}, path)
    replace_pickle(path, b"\x80\x02}q")
    with pytest.raises(ConfigError, match="its pickle is broken"):
        scan_pickle(path)


def test_no_room_is_said_before_writing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "w.bin")
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"0\.0 GB free; (.|\n)* set MYNA_CACHE to a folder"):
        convert_pickled_weights(tmp_path, ["w.bin"])


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "w.bin")
    (tmp_path / "file").touch()
    monkeypatch.setenv("MYNA_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"cannot write the converted weights"):
        convert_pickled_weights(tmp_path, ["w.bin"])


def test_cache_folder_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MYNA_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "myna"
