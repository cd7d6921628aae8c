"""The same weights in other files are the same base, and other weights are not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from myna.models.fingerprint import fingerprint_weights


def weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = {"a.weight": (130, 70), "b.weight": (5,), "experts": (3, 9, 80), "scale": ()}
    return {
        name: torch.randn(shape, generator=draw).to(torch.bfloat16).float()
        for name, shape in shapes.items()
    }


def written(folder: Path, *shards: dict[str, Tensor]) -> str:
    folder.mkdir()
    files = [folder / f"{number}.safetensors" for number in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, file)
    return fingerprint_weights(files)


def test_number_format_and_shards_do_not_matter(tmp_path: Path) -> None:
    whole = weights()
    one = written(tmp_path / "one", whole)
    assert one.startswith("sampled:") and len(one) == len("sampled:") + 64
    names = list(whole)
    first = {name: whole[name] for name in names[2:]}
    second = {name: whole[name] for name in names[:2]}
    assert written(tmp_path / "shards", first, second) == one
    half = {name: tensor.to(torch.bfloat16) for name, tensor in whole.items()}
    assert written(tmp_path / "half", half) == one


@pytest.mark.parametrize("name", ["a.weight", "b.weight", "experts", "scale"])
def test_a_tensor_that_moved_is_seen(tmp_path: Path, name: str) -> None:
    whole = weights()
    one = written(tmp_path / "one", whole)
    assert written(tmp_path / "trained", whole | {name: whole[name] * 1.02 + 0.01}) != one
    other = {("x" if key == name else key): tensor for key, tensor in whole.items()}
    assert written(tmp_path / "renamed", other) != one
    assert written(tmp_path / "gone", {k: v for k, v in whole.items() if k != name}) != one


def test_a_tensor_without_values_counts_by_its_shape(tmp_path: Path) -> None:
    one = written(tmp_path / "one", {"empty": torch.zeros(0, 3)})
    assert written(tmp_path / "two", {"empty": torch.zeros(0, 4)}) != one
