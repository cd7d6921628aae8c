"""Contenders: one training run of one tool on given work, in a process of its own.

Owns how each tool is set up and what is noted of its steps. A job (what to run) is read from a JSON
file, the outcome is written to another; `reference_job.py` starts the process and judges. Every
contender gets the same folder of `workloads.py`: weights, token ids, rows of each step, adapter.
Common to all: AdamW (0.9, 0.999, 1e-8), no weight decay, clipping at 1.0, a linear schedule without
warm-up, the loss of a step normalised by all its trained tokens, no logging, no saving.

    tutorial   the published recipe: Trainer + peft, 8 x 2 rows, checkpointing; float32 on a CPU,
               where its float16 is hundreds of times slower, bfloat16 on CUDA
    peft       Trainer + peft, no checkpointing, in the variant that is fastest here; bfloat16
               where the machine is faster in it
    trl        SFTTrainer likewise; on CUDA with its padding-free batches where flash attention is
    liger      peft's contender with Liger's kernels (CUDA)
    unsloth    Unsloth's model under trl's trainer (CUDA)
    myna       the library calls of `myna train`
    myna_compiled  the same with train.compile (CUDA)
"""

import importlib.util
import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from workloads import PAD, SEED, Row, examples_of, read_rows, steps_of

LEARNING_RATE = 1e-4  # the tutorial's
ON_CUDA_ONLY = ("liger", "unsloth", "myna_compiled")


@dataclass(frozen=True)
class Job:
    """What a process is to run."""

    contender: str
    folder: str
    """Holds `rows.json`, `model/` and `adapter-<dropout>/`."""
    dropout: float
    dtype: str
    """Of the frozen base."""
    num_rows: int
    batch_size: int
    num_steps: int
    """The learning rate falls to zero after them."""
    threads: int
    device: str
    spawned: float
    """`time.time()` when the process was started."""
    layout: str = "8x2"
    """Rows a micro-batch x accumulation, then `sorted` or nothing. myna lays out by itself."""
    adapter: str = "float32"
    """float32; bfloat16, peft's `autocast_adapter_dtype=False`; or autocast, `bf16=True`."""


@dataclass
class Outcome:
    """What a process saw."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    trained_tokens: list[int] = field(default_factory=list)
    """By which the loss of each step was divided."""
    step_seconds: list[float] = field(default_factory=list)
    """From one step's end to the next's, batches, logging and all."""
    startup_seconds: float = 0.0
    """From the start of the process to the first step."""
    resident_bytes: int = 0
    """Before the first step."""
    peak_bytes: int = 0
    notes: list[str] = field(default_factory=list)


class Clock:
    """Notes the ends of steps; on CUDA it waits for the device first."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.ends: list[float] = []

    def start(self) -> None:
        """Before the first step."""
        self.began = time.time()
        self.resident = _status("VmRSS")
        self.tick()

    def tick(self) -> None:
        """After a step."""
        if self.job.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def fill(self, outcome: Outcome) -> None:
        """What was noted, into `outcome`."""
        outcome.startup_seconds = self.began - self.job.spawned
        outcome.resident_bytes = self.resident
        outcome.step_seconds = [
            end - before for before, end in zip(self.ends, self.ends[1:], strict=False)
        ]


def run_myna(job: Job, rows: list[Row], clock: Clock) -> Outcome:
    """The calls of `myna train` between loading the rows and writing the result.

    The only place here that knows myna's training interface.
    """
    import torch

    from myna.device import limit_kernel_cache
    from myna.lora.adapter_file import inject_from
    from myna.lora.fused import fuse, fuse_projections
    from myna.models.frozen import fuse_frozen
    from myna.models.load import load_model
    from myna.training.computation import FILLED_TO, choose_computation, compile_layers
    from myna.training.events import EventLog
    from myna.training.fit import FitSettings, fit

    limit_kernel_cache()
    device = torch.device(job.device)
    base = load_model(f"{job.folder}/model", dtype=getattr(torch, job.dtype), device=device)
    model = inject_from(base.model, _adapter_folder(job), dropout=job.dropout).model
    fuse(model)
    fuse_frozen(model)
    compiles, on_cuda = job.contender == "myna_compiled", device.type == "cuda"
    if on_cuda and not compiles:
        fuse_projections(model)
    computation, how = choose_computation(
        model,
        micro_batch_size=None,
        padded_rows=8,
        pad_id=PAD,
        device=device,
        multiple=FILLED_TO if on_cuda and compiles else 1,
    )
    if compiles:
        compile_layers(model, fixed_sizes=on_cuda)
    settings = FitSettings(
        epochs=1,
        max_steps=job.num_steps,
        batch_size=job.batch_size,
        learning_rate=LEARNING_RATE,
        schedule="linear",
        warmup_steps=0,
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=SEED,
        save_steps=10**9,
        keep_checkpoints=1,
    )
    outcome = Outcome(notes=[how])

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            clock.tick()
            outcome.losses.append(event["loss"])
            outcome.grad_norms.append(event["grad_norm"])
            outcome.trained_tokens.append(event["trained_tokens"])

    with EventLog(None, note) as events:
        clock.start()
        fit(
            model,
            examples_of(rows),
            [],
            settings,
            computation=computation,
            device=device,
            events=events,
        )
    return outcome


def run_trainer(job: Job, rows: list[Row], clock: Clock) -> Outcome:
    """transformers' Trainer on peft's model: `tutorial`, `peft` and, on CUDA, `liger`."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = _peft_model(job)
    tutorial = job.contender == "tutorial"
    if tutorial:
        model.enable_input_require_grads()
    arguments = TrainingArguments(
        **_arguments(job),
        gradient_checkpointing=tutorial,
        logging_nan_inf_filter=tutorial,  # the default; it waits for the device at each micro-batch
        remove_unused_columns=False,
        use_liger_kernel=job.contender == "liger",
    )
    recorder = _recorded(Trainer, clock)(
        model=model,
        args=arguments,
        train_dataset=_rows_in_order(job, rows, attention_mask=True),
        data_collator=DataCollatorForSeq2Seq(_tokenizer(), padding=True),
    )
    recorder.train()
    return recorder.outcome


def run_trl(job: Job, rows: list[Row], clock: Clock) -> Outcome:
    """trl's SFTTrainer on token ids with labels; under `unsloth`, on Unsloth's model."""
    if job.contender == "unsloth":
        model = _unsloth_model(job)  # first: it replaces parts of transformers and trl on import
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    padding_free = _has_flash_attention(job)
    if job.contender != "unsloth":
        model = _peft_model(job, "flash_attention_2" if padding_free else "sdpa")
    arguments = SFTConfig(
        **_arguments(job),
        gradient_checkpointing=False,
        logging_nan_inf_filter=False,
        max_length=None,
        packing=False,
        padding_free=padding_free,
        shuffle_dataset=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    recorder = _recorded(SFTTrainer, clock)(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(_rows_in_order(job, rows, attention_mask=False)),
        processing_class=_tokenizer(),
    )
    recorder.train()
    outcome: Outcome = recorder.outcome
    outcome.notes.append(
        "padding_free, flash attention"
        if padding_free
        else "padded: padding_free needs flash attention, which "
        + ("is not installed" if job.device.startswith("cuda") else "is for CUDA only")
    )
    return outcome


def _recorded(trainer_class: Any, clock: Clock) -> Any:
    """A subclass that notes losses, gradient norms and the number each loss was divided by."""
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    class Recorded(trainer_class):  # type: ignore[misc]
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            self.add_callback(Ends())
            self._noted: list[tuple[int, Any, Any]] = []
            self._norms: list[Any] = []

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self._noted.append((self.state.global_step, loss, num_items_in_batch))
            return loss

        def _clip_grad_norm(self, model: Any) -> Any:
            norm = super()._clip_grad_norm(model)
            self._norms.append(norm)
            return norm

        @property
        def outcome(self) -> Outcome:
            outcome = Outcome(grad_norms=[float(norm) for norm in self._norms])
            for step, loss, number in self._noted:
                if step == len(outcome.losses):
                    outcome.losses.append(0.0)
                    outcome.trained_tokens.append(-1 if number is None else int(number))
                outcome.losses[step] += float(loss)
            return outcome

    return Recorded


def _arguments(job: Job) -> dict[str, Any]:
    """What Trainer and SFTTrainer are both told."""
    micro, accumulation = (int(number) for number in job.layout.split()[0].split("x"))
    return {
        "output_dir": f"{job.folder}/unused",
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "seed": SEED,
        "train_sampling_strategy": "sequential",
        "bf16": job.adapter == "autocast",
        "fp16": False,
        "use_cpu": job.device == "cpu",
        "dataloader_pin_memory": job.device != "cpu",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _rows_in_order(job: Job, rows: list[Row], *, attention_mask: bool) -> list[dict[str, Any]]:
    """The rows of all steps one after the other; the trainers read them in this order.

    The run is one epoch of them. With `sorted` each step's rows stand by length, longest first, so
    that its micro-batches are padded less.
    """
    dataset = []
    for step in steps_of(job.num_rows, job.batch_size, job.num_steps):
        if job.layout.endswith("sorted"):
            step = sorted(step, key=lambda row: -sum(map(len, rows[row])))
        for prompt, completion in (rows[row] for row in step):
            entry = {
                "input_ids": [*prompt, *completion],
                "labels": [*[-100] * len(prompt), *completion],
            }
            if attention_mask:
                entry["attention_mask"] = [1] * len(entry["input_ids"])
            dataset.append(entry)
    return dataset


def _tokenizer() -> Any:
    """Pads; the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": PAD}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
    )


def _adapter_folder(job: Job) -> Path:
    return Path(job.folder) / f"adapter-{job.dropout}"


def _peft_model(job: Job, attention: str = "sdpa") -> Any:
    import torch
    from peft import PeftModel

    from myna.models.load import load_model

    base = load_model(
        f"{job.folder}/model",
        dtype=getattr(torch, job.dtype),
        device=torch.device(job.device),
        attn_implementation=attention,
    )
    base.model.config.use_cache = False
    return PeftModel.from_pretrained(
        base.model,
        str(_adapter_folder(job)),
        is_trainable=True,
        autocast_adapter_dtype=job.adapter != "bfloat16",
    )


def _has_flash_attention(job: Job) -> bool:
    return (
        job.device.startswith("cuda")
        and job.dtype != "float32"
        and importlib.util.find_spec("flash_attn") is not None
    )


def _unsloth_model(job: Job) -> Any:
    """Unsloth's own model class and adapter layers, filled with the common adapter."""
    from unsloth import FastLanguageModel  # isort: skip
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    settings = json.loads((_adapter_folder(job) / "adapter_config.json").read_text())
    model, _ = FastLanguageModel.from_pretrained(
        f"{job.folder}/model", max_seq_length=8192, dtype=torch.bfloat16, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=job.dropout,
        target_modules=settings["target_modules"],
        use_gradient_checkpointing=False,
    )
    set_peft_model_state_dict(model, load_file(_adapter_folder(job) / "adapter_model.safetensors"))
    return model


RUN = {
    "tutorial": run_trainer,
    "peft": run_trainer,
    "trl": run_trl,
    "liger": run_trainer,
    "unsloth": run_trl,
    "myna": run_myna,
    "myna_compiled": run_myna,
}


def missing(contender: str, device: str) -> str | None:
    """Why a contender cannot run on this machine, or None."""
    if contender in ON_CUDA_ONLY and not device.startswith("cuda"):
        return "for CUDA only"
    package = {"liger": "liger_kernel", "unsloth": "unsloth", "trl": "trl"}.get(contender)
    if package is not None and importlib.util.find_spec(package) is None:
        return "not installed"
    return None


def run_job(job_file: Path, outcome_file: Path) -> None:
    """Run the job and write its outcome: all that this process is for."""
    _die_first_when_memory_ends()
    job = Job(**json.loads(job_file.read_text()))
    rows = read_rows(Path(job.folder))[: job.num_rows]
    import torch

    torch.set_num_threads(job.threads)
    clock = Clock(job)
    outcome = RUN[job.contender](job, rows, clock)
    clock.fill(outcome)
    outcome.peak_bytes = (
        torch.cuda.max_memory_allocated() if job.device.startswith("cuda") else _status("VmHWM")
    )
    outcome_file.write_text(json.dumps(asdict(outcome)))


def _status(key: str) -> int:
    """Bytes that Linux counts for this process, 0 elsewhere.

    VmHWM, the peak of resident memory, begins anew with each program; getrusage's does not: it may
    be that of the process that started this one.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


def _die_first_when_memory_ends() -> None:
    """A variant that does not fit must not take other programs of the machine with it."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
