"""A run made by hand: every number in it is known."""

import json
from pathlib import Path
from typing import Any

BEGIN = 1_800_000_000.0

START = {
    "event": "start",
    "version": "9.8.7",
    "torch": "2.99.0",
    "model": "some/model",
    "trainable": 25,
    "parameters": 1000,
    "total_steps": 6,
    "processes": 1,
    "model_type": "qwen3",
    "train_rows": 22,
    "held_out_rows": 2,
    "notes": ["rows.jsonl: prompt is question"],
    "environment": {"threads": 3, "processor": "Abacus 3000"},
}
PLAN = {
    "device": "cpu",
    "dtype": "float32",
    "reason": "float32 on cpu, as asked for.",
    "computation": "packs of shared prefixes",
    "memory": {
        "unit": "tokens",
        "limit": 8192,
        "layers_recomputed": 1,
        "num_layers": 5,
        "expected_peak_bytes": 500_000_000,
        "budget_bytes": 2_000_000_000,
    },
    "prepacked": {"use": False, "reason": "weights are not prepacked: no such layouts for them"},
}
DATA = {
    "rows_in": 24,
    "trained": 21,
    "refused": {"over_length": 2},
    "truncated": {"text_shortened": 1},
    "tokens": 1200,
    "trained_tokens": 300,
    "sha256": {"data": "d" * 64, "base": "b" * 64, "transformers": "5.99.0", "peft": "0.99.0"},
}
CONFIG = """model: "some/model"  # job.yaml line 1
data: ["/data/rows.jsonl"]  # job.yaml line 2
system: "Speak\\nlike a bird."  # command line
held_out: 2  # job.yaml line 3
lora:
  rank: 4  # job.yaml line 5 (lora_r)
  use_dora: false  # default
train:
  epochs: 2.0  # default
  keep_best: false  # default
"""
SAVED = {"system": "Speak\nlike a bird.", "stop_ids": [2, 7], "base_model": "some/model"}
SAMPLE = [
    {
        "place": "rows.jsonl line 7",
        "answer": 1,
        "context_tokens": 3,
        "trained_tokens": 2,
        "context": ["<user>", "What", "?"],
        "trained": ["A bird", "</s>"],
    }
]
EVALUATION = {
    "data": "held-out rows of the run",
    "rows_judged": 12,
    "loss": {"base": 4.5, "adapter": 1.25},
    "perplexity": {"base": 90.02, "adapter": 3.49},
    "trained_tokens": 60,
    "metrics": {
        "exact": {"base": 0.125, "adapter": 0.875},
        "chrf": {"base": 10.25, "adapter": 55.5},
    },
    "scale": {"exact": 1, "chrf": 100},
    "forgetting": {"text": "neutral sentences", "tokens": 50, "base": 2.0, "adapter": 2.125},
    "tasks": {},
    "rows": [
        {
            "place": f"rows.jsonl line {number}",
            "question": f"Question {number}?",
            "reference": f"reference {number}",
            "base": f"base says {number}",
            "adapter": f"adapter\nsays {number}",
            "loss": {"base": 4.0, "adapter": number / 4},
            "metrics": {"exact": {"base": 0, "adapter": 1}},
        }
        for number in range(1, 13)
    ],
}


def step(number: int, **changes: Any) -> dict[str, Any]:
    """The line of a step: loss 1/step, 4 rows of 25 tokens, of which 10 are trained, in 2 s."""
    return {
        "event": "step",
        "step": number,
        "epoch": round(number / 3, 4),
        "loss": 1 / number,
        "learning_rate": 0.001 / number,
        "grad_norm": 2.0,
        "rows": 4,
        "tokens": 100,
        "computed_tokens": 80,
        "trained_tokens": 40,
        "seconds": 2.0,
        "peak_memory_bytes": 400_000_000 + number,
    } | changes


def write_events(path: Path, *events: dict[str, Any]) -> None:
    lines = [json.dumps({"time": BEGIN + 10 * at} | event) for at, event in enumerate(events)]
    path.write_text("".join(f"{line}\n" for line in lines))
