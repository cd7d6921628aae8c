"""Workloads are the same every time and have the lengths they are described with."""

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from myna.data.packing import packed_tokens
from myna.models.load import load_model
from workloads import (
    BOS,
    TINY,
    WORKLOADS,
    Row,
    examples_of,
    long_rows,
    mixed_rows,
    rows_of,
    sha256_of,
    steps_of,
    system_rows,
    write_adapter,
    write_model,
)

HUANHUAN = Path(__file__).parents[3] / "shared" / "data" / "huanhuan.json"


def lengths(rows: list[Row]) -> list[int]:
    return [len(prompt) + len(completion) for prompt, completion in rows]


@pytest.mark.parametrize("generate", [mixed_rows, long_rows, system_rows])
def test_generated_rows_depend_on_the_seed_alone(generate: Callable[..., list[Row]]) -> None:
    assert generate(4, 1000) == generate(4, 1000) != generate(4, 1000, seed=1)
    assert all(4 <= id_ < 1000 or id_ == BOS for row in generate(4, 1000) for id_ in sum(row, ()))


def test_b_is_mixed_half_trained_and_shares_nothing() -> None:
    rows = mixed_rows(2000, 100_000)
    assert min(lengths(rows)) == 50 and max(lengths(rows)) <= 2000
    assert 235 < statistics.median(lengths(rows)) < 265
    assert all(0 <= len(completion) - len(prompt) <= 1 for prompt, completion in rows)
    examples = examples_of(rows[:16])
    assert packed_tokens(examples, range(16)) == sum(lengths(rows[:16])) - 16


def test_c_is_long_and_trained_throughout() -> None:
    rows = long_rows(8, 100_000)
    assert all(4000 <= length <= 8000 for length in lengths(rows))
    assert {prompt for prompt, _ in rows} == {(BOS,)}


def test_d_shares_its_system_prompt() -> None:
    rows = system_rows(64, 100_000)
    assert all(1540 <= length <= 1620 for length in lengths(rows))
    assert len({prompt[:1500] for prompt, _ in rows}) == 1
    assert {len(completion) for _, completion in rows} == {30}


@pytest.mark.skipif(not HUANHUAN.exists(), reason="needs ../shared/data/huanhuan.json")
def test_a_has_the_lengths_it_is_described_with() -> None:
    rows = rows_of(WORKLOADS["L"], HUANHUAN)
    assert rows[:128] == rows_of(WORKLOADS["A"], HUANHUAN)
    assert sha256_of(rows) == sha256_of(rows_of(WORKLOADS["L"], HUANHUAN))
    assert 50 < statistics.mean(lengths(rows)) < 57  # 53.6 over the whole file
    assert 17 < statistics.mean(len(completion) for _, completion in rows) < 19
    assert all(prompt[0] == BOS and completion[-1] == 2 for prompt, completion in rows)


def test_each_row_is_in_one_step() -> None:
    workload = WORKLOADS["L"]
    steps = steps_of(workload.num_rows, workload.batch_size, workload.num_steps)
    assert sorted(row for rows in steps for row in rows) == list(range(1000))
    assert [len(step) for step in steps] == [16] * 62 + [8]


@pytest.mark.parametrize("shape", TINY.values(), ids=TINY.keys())
def test_weights_are_exact_in_bfloat16_and_the_same_every_time(
    shape: object, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        write_model(tmp_path / name, shape)
    models = [
        load_model(str(tmp_path / name), dtype=torch.float32, device=torch.device("cpu")).model
        for name in ("one", "two")
    ]
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, first.bfloat16().float())
    table = models[0].get_input_embeddings().weight
    assert 0.019 < table.std() < 0.021
    assert shape.tied == (models[0].get_output_embeddings().weight is table)
    norms = [p for name, p in models[0].named_parameters() if name.endswith("layernorm.weight")]
    assert norms and all(bool((norm == 1).all()) for norm in norms)


def test_first_adapter_has_no_zeros(tmp_path: Path) -> None:
    write_adapter(tmp_path, TINY["BlueLM"], dropout=0.1)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    assert all(0.015 < tensor.std() < 0.025 for tensor in tensors.values())
