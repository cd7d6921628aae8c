"""Folders made to do harm (`benchmarks/hostile.py`): refused with words, before any allocation."""

import resource
import time
from pathlib import Path

import pytest

from hostile import FOLDERS, load, make_adapter, settings
from myna.lora.adapter_file import read_adapter


@pytest.mark.parametrize("name", FOLDERS)
def test_it_is_refused_before_anything_is_allocated(name: str, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path)
    FOLDERS[name](adapter)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    assert load(adapter) == ""
    assert time.monotonic() - started < 20, "it does not hang"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 256 * 1024, "kilobytes"
    assert not (tmp_path / "canary").exists()


def test_an_unspoilt_folder_is_loaded(tmp_path: Path) -> None:
    assert load(make_adapter(tmp_path)) == "it was loaded"


def test_what_real_adapters_have_is_not_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path)
    for change in (
        {"target_modules": r".*\.(q_proj|k_proj|v_proj)$"},
        {"target_modules": r"^(?!.*(?:visual|lm_head)).*(?:q_proj|v_proj).*"},
        {"target_modules": ["q_proj", "layers.0.mlp.up_proj"]},
        {"rank_pattern": {r"^model\.layers\.\d+\.self_attn.q_proj$": 4}},
        {"lora_alpha": 16.0},
    ):
        settings(**change)(adapter)
        read_adapter(adapter)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path)
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in adapter.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert read_adapter(snapshot).rank == 4
