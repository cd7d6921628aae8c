"""The loop against transformers' Trainer with peft, and against itself cut and resumed."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from myna.data.conversation import Place
from myna.data.loader import rows_of_steps
from myna.data.store import Example
from myna.errors import Interrupted, NonFiniteError, OutOfMemoryError
from myna.lora.fused import fuse
from myna.lora.inject import adapter_state
from myna.training.checkpoint import latest_checkpoint
from myna.training.computation import Packed, Padded
from myna.training.events import EventLog, read_events
from myna.training.fit import Evaluate, FitResult, FitSettings, fit
from myna.training.memory import Checkpointing
from myna.training.stop import StopRequest

CPU = torch.device("cpu")
PAD = 3


def random_rows(number: int, seed: int = 0) -> list[Example]:
    """Rows of 4 to 21 tokens; every second one begins like the others, so that packs share."""
    draw = torch.Generator().manual_seed(seed)
    shared = (1, 5, 6, 7)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=draw))
        return tuple(torch.randint(4, 64, (length,), generator=draw).tolist())

    return [
        Example(
            prompt_text="",
            completion_text="",
            prompt_ids=(*shared[: 1 + 3 * (row % 2)], *ids(2, 12)),
            completion_ids=(*ids(1, 9), 2),
            place=Place(Path("rows.jsonl"), row + 1, row + 1),
            turn=0,
        )
        for row in range(number)
    ]


def tiny_model(*, dropout: float = 0.0) -> peft.PeftModel:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
        initializer_range=0.1,  # larger than usual: a random model then learns in a few steps
    )
    lora = LoraConfig(r=4, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear")
    return get_peft_model(LlamaForCausalLM(config), lora)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def settings(**changes: Any) -> FitSettings:
    values: dict[str, Any] = {
        "epochs": 3,
        "max_steps": None,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "schedule": "linear",
        "warmup_steps": 0,
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": 42,
        "save_steps": 1000,
        "keep_checkpoints": 2,
    }
    return FitSettings(**(values | changes))


class StopWhen(StopRequest):
    """Asks for a stop at the boundaries where `condition` holds."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        super().__init__()
        self.condition = condition

    def __call__(self) -> bool:
        return self.condition()


def run(
    model: nn.Module,
    rows: list[Example],
    chosen: FitSettings,
    held_out: list[Example] | None = None,
    *,
    folder: Path | None = None,
    micro: int | None = 4,
    packed: bool = False,
    stop: StopRequest | None = None,
    resume: bool = False,
    checkpointing: Checkpointing = "auto",
    evaluate: Evaluate | None = None,
) -> FitResult:
    if folder is not None:
        folder.mkdir(exist_ok=True)
    found = latest_checkpoint(folder, pytest.fail) if resume and folder else None
    with EventLog(None if folder is None else folder / "events.jsonl") as events:
        return fit(
            model,
            rows,
            held_out or [],
            chosen,
            computation=Packed(CPU, micro, fused_head=True)
            if packed
            else Padded(micro or 4, PAD, CPU),
            checkpointing=checkpointing,
            device=CPU,
            events=events,
            checkpoints=folder,
            resume=found,
            stop=stop,
            evaluate=evaluate,
        )


class RecordingTrainer(Trainer):
    """Trainer as published, but with our order of rows and a note of every micro-batch's loss."""

    losses: list[float]

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def pad_only_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {f"t{number}": number for number in range(64)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="t0")), pad_token="t3"
    )


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_twenty_steps_have_the_losses_of_transformers_trainer_with_peft(
    accumulation: int, checkpointing: bool, packed: bool, tmp_path: Path
) -> None:
    """Ours as `myna train` computes: peft's layers fused, on packs or on padded batches."""
    rows, steps, batch = random_rows(24), 20, 4
    theirs = tiny_model()
    ours = copy.deepcopy(theirs)
    assert fuse(ours) == 14  # 7 linear layers in each of 2 decoder layers
    order = [
        row
        for _, _, chosen in rows_of_steps(24, batch, seed=42, first_step=1, last_step=steps)
        for row in chosen
    ]
    # The tutorial's encoding, correctly masked: BOS is part of the prompt and has no label.
    features = [
        {
            "input_ids": [*rows[row].prompt_ids, *rows[row].completion_ids],
            "attention_mask": [1] * (len(rows[row].prompt_ids) + len(rows[row].completion_ids)),
            "labels": [-100] * len(rows[row].prompt_ids) + list(rows[row].completion_ids),
        }
        for row in order
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=batch // accumulation,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        gradient_checkpointing=checkpointing,
    )
    trainer = RecordingTrainer(
        theirs,
        arguments,
        train_dataset=features,  # type: ignore[arg-type]
        data_collator=DataCollatorForSeq2Seq(pad_only_tokenizer(), padding=True),
    )
    trainer.losses = []
    trainer.train()
    expected = [
        sum(trainer.losses[start : start + accumulation])
        for start in range(0, len(trainer.losses), accumulation)
    ]

    result = run(
        ours,
        rows,
        settings(epochs=100, max_steps=steps),
        micro=batch // accumulation,
        packed=packed,
        checkpointing="all" if checkpointing else "none",
    )
    assert len(result.losses) == steps
    assert result.losses[-1] < 0.9 * result.losses[0]  # it learned: equal zeros would prove nothing
    assert result.losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_the_cut_into_micro_batches_changes_nothing(packed: bool) -> None:
    rows = random_rows(10)
    whole = run(tiny_model(), rows, settings(batch_size=6), micro=6)
    for micro in (1, 2, 4, 5):
        cut = run(tiny_model(), rows, settings(batch_size=6), micro=micro, packed=packed)
        assert cut.losses == pytest.approx(whole.losses, rel=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_is_the_mean_over_its_trained_tokens_computed_by_hand(packed: bool) -> None:
    rows = random_rows(3)
    model = tiny_model()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = [*row.prompt_ids, *row.completion_ids]
            scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            for position in range(len(row.prompt_ids), len(ids)):
                total -= scores[position - 1, ids[position]].item()
                tokens += 1
    result = run(model, rows, settings(epochs=1), micro=2, packed=packed)
    assert result.losses == pytest.approx([total / tokens], rel=1e-6)


def test_the_last_step_of_an_epoch_takes_the_rows_left_over(tmp_path: Path) -> None:
    result = run(tiny_model(), random_rows(10), settings(epochs=2), folder=tmp_path)
    assert result.step == 6
    events = [event for event in read_events(tmp_path / "events.jsonl") if event["event"] == "step"]
    assert [event["rows"] for event in events] == [4, 4, 2, 4, 4, 2]
    assert [event["epoch"] for event in events] == [0.3333, 0.6667, 1, 1.3333, 1.6667, 2]
    assert all(
        event["computed_tokens"] >= event["tokens"] > event["trained_tokens"] for event in events
    )
    assert all(event["peak_memory_bytes"] > 10**7 and event["seconds"] > 0 for event in events)


@pytest.mark.parametrize("cut", [1, 4, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path: Path, cut: int, packed: bool) -> None:
    rows, held_out = random_rows(10), random_rows(3, seed=1)
    chosen = settings(epochs=3, save_steps=3, keep_best=True)
    straight = tiny_model(dropout=0.2)
    whole = run(straight, rows, chosen, held_out, folder=tmp_path / "straight_run", packed=packed)

    calls = iter(range(1, 100))
    with pytest.raises(Interrupted, match=f"stopped after step {cut}; the same command goes on"):
        run(
            tiny_model(dropout=0.2),
            rows,
            chosen,
            held_out,
            folder=tmp_path / "cut",
            packed=packed,
            stop=StopWhen(lambda: next(calls) == cut),
        )
    resumed = tiny_model(dropout=0.2)
    rest = run(resumed, rows, chosen, held_out, folder=tmp_path / "cut", packed=packed, resume=True)
    assert rest.losses == whole.losses[cut:]
    assert rest.best_loss == whole.best_loss and rest.best_step == whole.best_step
    assert all(
        torch.equal(value, weights(resumed)[name]) for name, value in weights(straight).items()
    )


def test_dropout_is_drawn_anew_each_step_and_repeats_with_the_seed() -> None:
    rows = random_rows(4)
    frozen = settings(learning_rate=1e-12, epochs=3)
    first = run(tiny_model(dropout=0.5), rows, frozen).losses
    model = tiny_model(dropout=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    moving = run(model, rows, frozen).losses
    assert first == pytest.approx([first[0]] * 3)  # B is zero: dropout cannot be seen
    assert len(set(moving)) == 3


def test_early_stopping_and_the_best_adapter(tmp_path: Path) -> None:
    rows, held_out = random_rows(4), random_rows(4, seed=9)  # nothing general to learn
    chosen = settings(
        epochs=100,
        learning_rate=0.05,
        schedule="constant",
        eval_steps=2,
        early_stopping_patience=3,
        keep_best=True,
    )
    model = tiny_model()
    result = run(model, rows, chosen, held_out, folder=tmp_path)
    evaluations = [e for e in read_events(tmp_path / "events.jsonl") if e["event"] == "eval"]
    losses = [event["loss"] for event in evaluations]
    assert result.stopped_early and result.step < 100
    assert [event["step"] for event in evaluations] == list(range(2, result.step + 1, 2))
    assert losses.index(min(losses)) == len(losses) - 4
    assert result.best_loss == min(losses)
    # Killed after the last checkpoint, the run is over: it does not train on.
    rest = run(tiny_model(), rows, chosen, held_out, folder=tmp_path, resume=True)
    assert rest.stopped_early and rest.losses == []
    again = run(
        model, rows, settings(learning_rate=1e-12, max_steps=1), held_out, folder=tmp_path / "x"
    )
    assert again.best_loss == pytest.approx(min(losses), rel=1e-5)  # the best is in the model


def test_the_best_adapter_by_a_metric_of_which_more_is_better(tmp_path: Path) -> None:
    rows, held_out = random_rows(4), random_rows(4, seed=9)
    chosen = settings(
        epochs=100,
        eval_steps=2,
        save_steps=2,
        early_stopping_patience=3,
        keep_best=True,
        metrics=("worth",),
        best_by="worth",
    )
    worth = [0.1, 0.5, 0.4, 0.3, 0.2]

    def judging(model: nn.Module, values: list[float]) -> Evaluate:
        def evaluate() -> dict[str, float]:
            seen.append(weights(model))
            return {"worth": values[len(seen) - 1]}

        return evaluate

    seen: list[dict[str, Tensor]] = []
    model = tiny_model()
    result = run(
        model, rows, chosen, held_out, folder=tmp_path / "a", evaluate=judging(model, worth)
    )
    assert (result.best_step, result.step, result.stopped_early) == (4, 10, True)
    assert all(torch.equal(value, seen[1][name]) for name, value in weights(model).items())
    events = [e for e in read_events(tmp_path / "a" / "events.jsonl") if e["event"] == "eval"]
    assert [event["metrics"] for event in events] == [{"worth": value} for value in worth]

    seen, calls = [], iter(range(1, 100))
    cut = tiny_model()
    with pytest.raises(Interrupted):
        run(
            cut,
            rows,
            chosen,
            held_out,
            folder=tmp_path / "b",
            evaluate=judging(cut, worth),
            stop=StopWhen(lambda: next(calls) == 6),
        )
    seen, rest = [], tiny_model()
    again = run(
        rest,
        rows,
        chosen,
        held_out,
        folder=tmp_path / "b",
        evaluate=judging(rest, worth[3:]),
        resume=True,
    )
    assert (again.best_step, again.step) == (4, 10)
    assert all(torch.equal(value, weights(rest)[name]) for name, value in weights(model).items())


def test_between_evaluations_of_equal_worth_the_lower_loss_is_better(tmp_path: Path) -> None:
    rows, held_out = random_rows(4), random_rows(4, seed=9)
    chosen = settings(epochs=20, eval_steps=2, learning_rate=0.05, schedule="constant")
    by_loss = run(tiny_model(), rows, chosen, held_out)
    by_worth = replace(chosen, metrics=("worth",), best_by="worth")
    equal = run(tiny_model(), rows, by_worth, held_out, evaluate=lambda: {"worth": 0.0})
    assert 2 <= by_loss.best_step < 20
    assert (equal.best_step, equal.best_loss) == (by_loss.best_step, by_loss.best_loss)


def test_a_non_finite_loss_stops_before_the_weights_move() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_base_model().lm_head.weight[5, 0] = float("nan")
    before = weights(model)
    with pytest.raises(NonFiniteError) as caught:
        run(model, random_rows(2), settings())
    assert "step 1: loss is nan" in str(caught.value)
    assert "the weights did not move" in str(caught.value)
    assert "rows.jsonl line 1" in str(caught.value) and "rows.jsonl line 2" in str(caught.value)
    assert all(torch.equal(value, weights(model)[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("checkpointing", "calls"),
    [("auto", [1, 1]), ("none", [1, 1]), (1, [2, 1]), (2, [2, 2]), ("all", [2, 2])],
)
def test_activation_checkpointing_computes_the_lowest_layers_twice(
    checkpointing: Checkpointing, calls: list[int]
) -> None:
    model = tiny_model()
    counts = [0, 0]

    def count(layer: int) -> None:
        counts[layer] += 1

    for layer in (0, 1):
        model.get_submodule(f"base_model.model.model.layers.{layer}.mlp").register_forward_pre_hook(
            lambda *_, layer=layer: count(layer)
        )
    run(model, random_rows(4), settings(epochs=1), checkpointing=checkpointing)
    assert counts == calls


def refuse(model: nn.Module, where: str, most: int) -> None:
    """Let `model` run out of memory, as torch and Python say it, with more than `most` tokens."""

    def tokens(hidden: Tensor) -> int:
        return hidden.shape[0] * hidden.shape[1]

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor) -> Tensor:
            return hidden.view_as(hidden)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            if tokens(gradient) > most:
                raise MemoryError
            return gradient

    def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if where == "backward":
            return Identity.apply(output)  # type: ignore[no-any-return, no-untyped-call]
        if model.training == (where == "forward") and tokens(output) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return None

    model.get_submodule("base_model.model.model.layers.0.mlp").register_forward_hook(forward)


def plans_of(folder: Path) -> list[dict[str, Any]]:
    events = read_events(folder / "events.jsonl")
    return [event for event in events if event["event"] == "plan"]


@pytest.mark.parametrize("where", ["forward", "backward", "eval"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_that_runs_out_of_memory_is_trained_on_the_same_rows_to_the_same_losses(
    tmp_path: Path, where: str, packed: bool
) -> None:
    rows, held_out = random_rows(10), random_rows(6, seed=1)
    chosen = settings(epochs=2, eval_steps=2)
    rest: dict[str, Any] = {"micro": None, "packed": packed}
    enough = run(tiny_model(), rows, chosen, held_out, folder=tmp_path / "enough", **rest)
    model = tiny_model()
    refuse(model, where, 35)
    short = run(model, rows, chosen, held_out, folder=tmp_path / "short", **rest)
    assert short.losses == pytest.approx(enough.losses, rel=1e-5)
    assert short.best_loss == pytest.approx(enough.best_loss, rel=1e-5)
    assert plans_of(tmp_path / "enough") == []
    plans = plans_of(tmp_path / "short")
    assert {plan["part"] for plan in plans} == {"eval" if where == "eval" else "step"}
    last = plans[-1]["memory"]
    if packed:
        assert 20 <= last["limit"] <= 35
    else:
        assert last["limit"] <= 2
    assert last["layers_recomputed"] == (0 if where == "eval" else 2)

    def work(folder: str) -> list[tuple[int, int, int]]:
        return [
            (event["step"], event["rows"], event["trained_tokens"])
            for event in read_events(tmp_path / folder / "events.jsonl")
            if event["event"] == "step"
        ]

    assert work("short") == work("enough")


def test_memory_that_runs_out_in_the_optimizer_leaves_weights_and_state_as_they_were(
    tmp_path: Path,
) -> None:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    rows, chosen = random_rows(10), settings(epochs=2)
    enough = tiny_model(dropout=0.1)
    losses = run(enough, rows, chosen, micro=None, packed=True, checkpointing="all").losses
    calls = iter(range(100))

    def fail(*_: Any) -> None:
        if next(calls) in (0, 3):
            raise MemoryError

    short = tiny_model(dropout=0.1)
    hook = register_optimizer_step_pre_hook(fail)
    try:
        found = run(short, rows, chosen, micro=None, packed=True, folder=tmp_path)
    finally:
        hook.remove()
    # Layers recompute, and that is all: not one bit is different.
    assert found.losses == losses
    assert all(torch.equal(value, weights(short)[name]) for name, value in weights(enough).items())
    assert [plan["step"] for plan in plans_of(tmp_path)] == [1, 3]
    assert [plan["memory"]["layers_recomputed"] for plan in plans_of(tmp_path)] == [1, 2]


@pytest.mark.parametrize("cut", [1, 4])
def test_a_resumed_run_replays_the_plans_that_were_made_on_the_way(
    tmp_path: Path, cut: int
) -> None:
    """From step 4 on there is less memory; cut before or behind that, the bytes are the same."""
    rows, chosen = random_rows(10), settings(epochs=2)

    def run_short(name: str, done: int, stop_after: int, *, resume: bool = False) -> FitResult:
        nonlocal model
        model = tiny_model(dropout=0.2)

        def fail(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if done >= 3 and inputs[0].shape[1] > 20:
                raise MemoryError

        def stop() -> bool:  # asked after every step
            nonlocal done
            done += 1
            return done == stop_after

        model.get_submodule("base_model.model.model.norm").register_forward_pre_hook(fail)
        folder = tmp_path / name
        more: dict[str, Any] = {
            "micro": None,
            "packed": True,
            "stop": StopWhen(stop),
            "resume": resume,
        }
        return run(model, rows, chosen, folder=folder, **more)

    model = tiny_model()
    whole = run_short("straight", 0, 0)
    expected = weights(model)
    made = plans_of(tmp_path / "straight")
    assert len(made) > 2 and {plan["step"] for plan in made} == {4}
    with pytest.raises(Interrupted):
        run_short("cut", 0, cut)
    rest = run_short("cut", cut, 0, resume=True)
    assert rest.losses == whole.losses[cut:]
    assert all(torch.equal(value, weights(model)[name]) for name, value in expected.items())
    # Behind it, the plan is in the checkpoint and not made again.
    assert [plan["memory"] for plan in plans_of(tmp_path / "cut")] == [p["memory"] for p in made]
    said = ["resumed, not bit-identical" in plan["message"] for plan in plans_of(tmp_path / "cut")]
    assert all(said) if cut < 4 else not any(said)


def test_when_nothing_smaller_is_left_the_last_whole_step_is_saved(tmp_path: Path) -> None:
    model, rows = tiny_model(), random_rows(8)
    steps = iter(range(100))
    refused = False

    def fail(*_: Any) -> None:
        nonlocal refused
        refused = refused or next(steps) >= 2
        if refused:
            raise MemoryError

    model.get_submodule("base_model.model.model.norm").register_forward_pre_hook(fail)
    with pytest.raises(OutOfMemoryError) as caught:
        run(model, rows, settings(), micro=None, packed=True, folder=tmp_path)
    first, second = str(caught.value).split("\n")
    longest = max(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    assert first == (
        "memory ran out in step 3, and nothing smaller is left to try than steps in packs of at "
        f"most {longest - 1} tokens, all 2 layers recomputed (memory ran out in step 3)."
    )
    assert second.startswith(f"  Use a train.max_length below {longest} (with over_length: ")
    found = latest_checkpoint(tmp_path, pytest.fail)
    assert found is not None and found.state.step == 2
    assert all(
        torch.equal(found.adapter[name], value) for name, value in adapter_state(model).items()
    )
    assert caught.value.exit_code == 5


def test_what_the_settings_fix_is_not_changed_but_named() -> None:
    model = tiny_model()
    refuse(model, "forward", 30)
    with pytest.raises(OutOfMemoryError) as caught:
        run(model, random_rows(8), settings(), micro=4, packed=True, checkpointing="none")
    assert "no layer recomputed" in str(caught.value)
    assert (
        "Leave train.micro_batch_size and train.checkpointing to myna by not setting them, or use a"
        in str(caught.value)
    )
