"""The tutorial's job: BlueLM learns to speak as Zhen Huan, from the YAML in `examples/`.

The golden `hub_like` checkpoint stands in for the 7B weights: the same files, the same tokenizer
layout, random weights.
"""

import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor
from transformers import Trainer, TrainingArguments

from myna.cli.preparation import prepare_rows
from myna.cli.train import run
from myna.config_file import load_config
from myna.data.conversation import Message
from myna.data.loader import rows_of_steps
from myna.inference.generate import Sampling
from myna.inference.speaker import open_speaker
from myna.lora.adapter_file import load_adapter_state
from myna.lora.inject import adapter_state, inject
from myna.models.load import load_model
from myna.training.events import read_events

ROOT = Path(__file__).parents[2]
YAML = ROOT / "examples" / "bluelm_zhenhuan.yaml"
MODEL = ROOT / "tests" / "golden" / "hub_like"
TUTORIAL = ROOT / "tests" / "golden" / "tokenizer" / "tutorial_sft.json"
HUANHUAN = ROOT.parent / "shared" / "data" / "huanhuan.json"
PERSONA = "现在你要扮演皇帝身边的女人--甄嬛"

needs_data = pytest.mark.skipif(
    not HUANHUAN.exists(), reason="../shared/data/huanhuan.json is not beside the repository"
)


def job(*overrides: str, data: Path = HUANHUAN) -> list[str]:
    return [f"model={MODEL}", f"data={data}", "dtype=float32", *overrides]


def tutorial_rows(folder: Path) -> tuple[Path, list[dict[str, list[int]]]]:
    """The tutorial's twelve golden records: as rows for us, and as its own ids and labels."""
    examples = json.loads(TUTORIAL.read_text(encoding="utf-8"))["examples"]
    rows, features = [], []
    for example in examples:
        question = example["prompt"].removeprefix(f"[|Human|]:{PERSONA}\n\n ")
        rows.append(
            {
                "instruction": question.removesuffix("[|AI|]:"),
                "input": "",
                "output": example["answer"],
            }
        )
        labels = [-100, *example["labels"][1:]]  # the tutorial leaves a label on BOS
        features.append({"input_ids": example["input_ids"], "labels": labels})
    path = folder / "tutorial.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path, features


class RecordingTrainer(Trainer):
    """Trainer as published, in our order of rows, noting every micro-batch's loss."""

    losses: list[float]

    def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *args: object, **kwargs: object) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def collate(features: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    width = max(len(feature["input_ids"]) for feature in features)

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([f[name] + [fill] * (width - len(f[name])) for f in features])

    ids = padded("input_ids", 3)
    return {"input_ids": ids, "attention_mask": (ids != 3).long(), "labels": padded("labels", -100)}


def test_the_tutorials_own_ids_give_the_same_losses_under_trainer_and_peft(tmp_path: Path) -> None:
    """Twelve golden records through the whole of myna train, against their golden ids."""
    data, features = tutorial_rows(tmp_path)
    overrides = job(
        "lora.dropout=0",
        "per_device_train_batch_size=2",
        "train.max_steps=20",
        "train.learning_rate=1e-2",
        "train.epochs=20",
        f"output={tmp_path / 'run'}",
        data=data,
    )
    directory = run(load_config(YAML, overrides), console=Console(file=io.StringIO())).directory
    ours = [e["loss"] for e in read_events(directory.events) if e["event"] == "step"]

    base = load_model(str(MODEL), dtype=torch.float32, device=torch.device("cpu")).model
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    first = adapter_state(
        inject(
            load_model(str(MODEL), dtype=torch.float32, device=torch.device("cpu")).model,
            rank=8,
            alpha=32,
            dropout=0,
            target_modules=names,
            use_rslora=False,
            use_dora=False,
            init="default",
            seed=42,
        ).model
    )
    theirs = get_peft_model(base, LoraConfig(r=8, lora_alpha=32, target_modules=names))
    load_adapter_state(theirs, first)  # the same first values; all else is peft's and Trainer's
    order = itertools.chain.from_iterable(
        rows for _, _, rows in rows_of_steps(12, 4, seed=42, first_step=1, last_step=20)
    )
    trainer = RecordingTrainer(
        theirs,
        TrainingArguments(
            output_dir=str(tmp_path / "theirs"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            learning_rate=1e-2,
            lr_scheduler_type="linear",
            gradient_checkpointing=True,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[features[row] for row in order],  # type: ignore[arg-type]
        data_collator=collate,
    )
    trainer.losses = []
    trainer.train()
    expected = [sum(pair) for pair in zip(*[iter(trainer.losses)] * 2, strict=True)]
    assert len(ours) == 20 and ours[-1] < 0.9 * ours[0]
    assert ours == pytest.approx(expected, rel=1e-5)


@needs_data
def test_all_rows_are_encoded_as_the_tutorial_counts_them() -> None:
    expected = json.loads(TUTORIAL.read_text(encoding="utf-8"))
    prepared = prepare_rows(load_config(YAML, job()).config, trust_remote_code=False)
    accounting = prepared.dataset.accounting
    assert accounting.rows_in == accounting.trained == expected["records"] == 3729
    assert accounting.tokens == expected["total_tokens_this_tokenizer"]
    assert (
        max(
            len(example.prompt_ids) + len(example.completion_ids)
            for example in prepared.dataset.examples
        )
        == expected["longest_this_tokenizer"]
    )


@pytest.mark.parametrize("steps", [3, pytest.param(702, marks=pytest.mark.full)])
@needs_data
def test_the_job_trains_on_all_rows_and_the_result_answers(tmp_path: Path, steps: int) -> None:
    said = io.StringIO()
    overrides = job(f"train.max_steps={steps}", f"output={tmp_path / 'run'}")
    directory = run(load_config(YAML, overrides), console=Console(file=said, width=120)).directory
    assert "3,729 rows train" in said.getvalue() and f"{steps} steps of 16 rows" in said.getvalue()
    losses = [e["loss"] for e in read_events(directory.events) if e["event"] == "step"]
    assert len(losses) == steps and losses[-1] < losses[0]
    speaker = open_speaker(str(directory.path))
    prompt = speaker.encoder.prompt([Message("user", "你是谁？")])
    assert prompt.text == f"<s>[|Human|]:{PERSONA}\n\n 你是谁？[|AI|]:"
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    ((_, answer),) = speaker.answer_all([prompt.ids], sampling, batch_size=1)
    assert answer.text and (answer.stopped or len(answer.ids) == 12)
