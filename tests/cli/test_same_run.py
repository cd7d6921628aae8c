"""A run is not mixed with another one: every setting there is, one at a time."""

from pathlib import Path
from typing import Any

import pytest

from myna.cli.resumption import changed_settings, differences
from myna.config import is_free, leaves
from myna.config_file import load_config
from myna.errors import ConfigError
from myna.run_dir import RunDir

CHANGED: dict[str, Any] = {
    "model": "other",
    "data": "other.jsonl",
    "columns": {"prompt": "frage"},
    "system": "Another voice.",
    "template": "other.jinja",
    "held_out": 0.25,
    "notify": "true",
    "report_to": ["tensorboard"],
    "device": "cpu",
    "dtype": "bfloat16",
    "lora.rank": 4,
    "lora.alpha": 5,
    "lora.dropout": 0.3,
    "lora.target_modules": "q_proj",
    "lora.use_rslora": True,
    "lora.use_dora": True,
    "lora.init": "pissa",
    "lora.start_from": "runs/a",
    "train.epochs": 4,
    "train.max_steps": 7,
    "train.batch_size": 3,
    "train.micro_batch_size": 2,
    "train.learning_rate": 0.5,
    "train.schedule": "linear",
    "train.warmup_steps": 9,
    "train.warmup_ratio": 0.2,
    "train.weight_decay": 0.1,
    "train.max_grad_norm": 2,
    "train.max_length": 99,
    "train.over_length": "drop",
    "train.control_tokens": "allow",
    "train.train_on": "last",
    "train.on_bad_row": "skip",
    "train.checkpointing": "all",
    "train.compile": True,
    "train.on_nonfinite": "skip",
    "train.seed": 1,
    "train.eval_steps": 5,
    "train.early_stopping_patience": 2,
    "train.keep_best": True,
    "train.metrics": ["json"],
    "train.best_by": "exact_match",
    "train.logging_steps": 3,
    "train.save_steps": 4,
    "train.keep_checkpoints": 3,
    "train.save_on_each_node": True,
}
"""Another value for each."""
NEEDS_HELD_OUT: dict[str, dict[str, Any]] = {
    "train.eval_steps": {},
    "train.early_stopping_patience": {},
    "train.keep_best": {},
    "train.metrics": {},
    "train.best_by": {"train.metrics": ["exact_match"]},
}
"""With what else they are there."""


def test_the_list_has_every_setting() -> None:
    assert {*CHANGED, "output"} == {*leaves()}


@pytest.mark.parametrize("name", CHANGED)
def test_a_setting_that_changes_what_is_trained_is_refused_with_both_values(
    name: str, tmp_path: Path
) -> None:
    held_out = {"held_out": 0.5, **NEEDS_HELD_OUT[name]} if name in NEEDS_HELD_OUT else {}
    begun = load_config(None, flags={"model": "m", "data": ["d.jsonl"], **held_out})
    directory = RunDir(tmp_path)
    directory.config.write_text(begun.with_output(tmp_path).to_yaml())
    flags = {"model": "m", "data": ["d.jsonl"], **held_out, name: CHANGED[name]}
    asked = load_config(None, flags=flags).with_output(tmp_path).config
    if is_free(leaves()[name]):
        assert changed_settings(directory, asked) == []
        return
    with pytest.raises(ConfigError) as caught:
        changed_settings(directory, asked)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path} holds a run with other settings:"
    assert lines[1].startswith(f"  {name} is ") and " now and was " in lines[1]
    (change,) = changed_settings(directory, asked, allowed=(name,))
    assert change.name == name and lines[1].strip() == str(change)


def test_what_only_the_bits_depend_on_is_told() -> None:
    before = {"threads": 2, "processor": "A"}
    assert differences(before, {"threads": 2, "processor": "A", "gpu": "B"}) == []
    assert differences(before, {"threads": 1, "processor": "A"}) == [
        "threads is 1 now and was 2; resumed, not bit-identical"
    ]
