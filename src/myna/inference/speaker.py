"""A speaker: a model with its adapter, its prompts and what ends its answers.

Owns what `SOURCE` of `myna chat` may be (a run, an adapter folder, a model, nothing) and putting
together what was saved there: the tokenizer, template and persona that the adapter was trained
with, not the base's. Generation is `generate.py`'s.
"""

import difflib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from myna.data.conversation import Message
from myna.data.encode import Encoder
from myna.data.templates import choose_template
from myna.device import Compute, choose_compute
from myna.errors import ConfigError
from myna.inference.generate import (
    Answer,
    Sampling,
    answer_all,
    describe,
    room_for_answer,
    settle,
    stream_answer,
    unknown_ids,
)
from myna.lora.adapter_file import (
    CONFIG_FILE,
    AdapterInfo,
    check_origin,
    load_adapter,
    read_adapter,
)
from myna.lora.switch import AdapterSwitch
from myna.models.load import LoadedModel, context_length, fingerprint_of, load_model
from myna.models.source import find_folder
from myna.models.tokenizer import VOCABULARY_FILES, LoadedTokenizer, load_tokenizer
from myna.run_dir import RUNS, RunDir, newest_run


@dataclass(frozen=True)
class Speaker:
    """A model that answers; parts in memory make one too, to judge a model in training."""

    model: PreTrainedModel
    """The base; an adapter's layers are inside it."""
    encoder: Encoder
    """Makes prompts; refuses control tokens in what people write."""
    pad_id: int
    """Fills shorter rows of a batch."""
    description: str = ""
    """The base in a line: name, size, dtype, device."""
    adapter: Path | None = None
    """The adapter's folder, if there is one."""
    notes: tuple[str, ...] = ()
    """What a person should know about how it was put together."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one that the adapter was trained with."""
        tokenizer: PreTrainedTokenizerBase = self.encoder.tokenizer
        return tokenizer

    @property
    def context(self) -> int | None:
        """Most tokens that prompt and answer may have together."""
        return context_length(self.model.config)

    @cached_property
    def history_encoder(self) -> Encoder:
        """As `encoder`, for messages that the model itself may have put control tokens into."""
        return Encoder(
            self.tokenizer,
            self.encoder.template,
            stop_ids=self.encoder.stop_ids,
            system=self.encoder.system,
            control_tokens="allow",
        )

    def settings(self, sampling: Sampling) -> GenerationConfig:
        """What decides an answer: the base's generation settings with `sampling` on top.

        Raises ConfigError for options that contradict each other.
        """
        base = self.model.generation_config
        return settle(
            base if isinstance(base, GenerationConfig) else GenerationConfig(),
            sampling,
            stop_ids=self.encoder.stop_ids,
            pad_id=self.pad_id,
            unknown_ids=self._unknown_ids,
        )

    def describe(self, sampling: Sampling) -> str:
        """`greedy`, or `temperature 0.8, top-p 0.95`."""
        return describe(self.settings(sampling))

    def check_fits(self, prompt_ids: Sequence[int]) -> None:
        """Raise DataError for a prompt that leaves no room for an answer."""
        room_for_answer(self.model, prompt_ids, 1)

    def ask(self, question: str | Sequence[Message], sampling: Sampling | None = None) -> Answer:
        """The answer to a question, or to messages of which the last is the user's.

        Raises DataError for a text that spells a control token or is longer than the context.
        """
        messages = [Message("user", question)] if isinstance(question, str) else list(question)
        prompt = self.encoder.prompt(messages)
        ((_, answer),) = self.answer_all([prompt.ids], sampling or Sampling(), batch_size=1)
        return answer

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generator[str, None, Answer]:
        """One answer, piece by piece; see `generate.stream_answer`."""
        return stream_answer(
            self.model, self.tokenizer, prompt_ids, self.settings(sampling), seed=sampling.seed
        )

    def answer_all(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, batch_size: int
    ) -> Iterator[tuple[int, Answer]]:
        """Index and answer of every prompt, in no promised order; see `generate.answer_all`."""
        return answer_all(
            self.model,
            self.tokenizer,
            prompts,
            self.settings(sampling),
            batch_size=batch_size,
            seed=sampling.seed,
        )

    @cached_property
    def _unknown_ids(self) -> list[int]:
        return unknown_ids(self.model, self.tokenizer)


@dataclass(frozen=True)
class SharedBase:
    """One model in memory, and the adapters on it, of which one at a time computes."""

    base: Speaker | None
    """Without an adapter; None where it is no chat model."""
    speakers: Mapping[str, Speaker]
    """By the names of the adapters. Their model is the same object."""
    switch: AdapterSwitch
    """Says which adapter the model has; who asks a speaker says so before."""
    notes: tuple[str, ...]
    """What a person should know about how it was put together."""


def open_speaker(
    source: str | None,
    *,
    system: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    force_base: bool = False,
) -> Speaker:
    """Load what `source` names: a run directory, an adapter folder, a model folder or a hub id.

    None is the newest finished run. `system` takes the place of the persona used in training; an
    empty one takes it away. `device` and `dtype` are those of `choose_compute`. Raises ConfigError
    for a source that is none of these, an unfinished run, and a base that cannot be found, does not
    fit, or is not the one that the adapter was trained on, unless `force_base` says to use it all
    the same, which the notes then tell.
    """
    adapter = find_adapter(source)
    info = read_adapter(adapter) if adapter is not None else None
    if info is not None:
        base = find_base(info)
    else:
        assert source is not None, "without a source the newest run's adapter is taken"
        base = source
    compute = choose_compute(device, dtype)
    return _assemble(base, info, system, compute, trust_remote_code, force_base)


def open_speakers(
    base: str,
    adapters: Mapping[str, Path],
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    force_base: bool = False,
) -> SharedBase:
    """Load `base` once, with adapters (name to folder) that share it.

    Raises ConfigError as `open_speaker` does, for the first adapter at fault.
    """
    compute = choose_compute(device, dtype)
    of_base = load_tokenizer(base, trust_remote_code=trust_remote_code)
    infos = {name: read_adapter(folder) for name, folder in adapters.items()}
    voices = {
        name: voice_of(info, of_base, None, trust_remote_code) for name, info in infos.items()
    }
    voice_of_base, why_not = None, ""
    try:
        voice_of_base = voice_of(None, of_base, None, trust_remote_code)
    except ConfigError as error:  # no chat model: its adapters brought a template along
        if not adapters:
            raise
        why_not = str(error).partition("\n")[0]
    fingerprint = fingerprint_of(base, trust_remote_code=trust_remote_code) if infos else ""
    forced = {
        name: voices[name].check(info, fingerprint, force_base) for name, info in infos.items()
    }
    loaded = _load(base, compute, trust_remote_code)
    # Before peft's layers are in the model, whose weights it counts.
    description = _describe(base, loaded.model, compute)
    switch = AdapterSwitch(loaded.model, adapters)

    def speaker(voice: Voice, notes: Sequence[str], folder: Path | None) -> Speaker:
        return Speaker(loaded.model, voice.encoder, voice.pad_id, description, folder, tuple(notes))

    return SharedBase(
        base=speaker(voice_of_base, loaded.notes, None) if voice_of_base else None,
        speakers={
            name: speaker(voice, forced[name], infos[name].folder) for name, voice in voices.items()
        },
        switch=switch,
        notes=(
            *loaded.notes,
            *(f"{name}: {note}" for name, notes in forced.items() for note in notes),
            *([f"the base alone is not served: {why_not}"] if why_not else []),
        ),
    )


@dataclass(frozen=True)
class Voice:
    """What decides prompts and their end."""

    encoder: Encoder
    pad_id: int
    tokenizer: LoadedTokenizer

    def check(self, info: AdapterInfo, base: str, force: bool) -> tuple[str, ...]:
        """See `check_origin`; `base` is the fingerprint of the weights."""
        return check_origin(
            info,
            base=base,
            tokenizer=self.tokenizer.fingerprint,
            template=self.encoder.template.fingerprint,
            force=force,
        )


def voice_of(
    info: AdapterInfo | None, of_base: LoadedTokenizer, system: str | None, trust_remote_code: bool
) -> Voice:
    """The voice of the adapter in `info`; with None, of the base alone.

    `system` takes the place of the persona used in training. Raises ConfigError.
    """
    loaded = of_base
    if info is not None and any(any(info.folder.glob(name)) for name in VOCABULARY_FILES):
        loaded = load_tokenizer(str(info.folder), trust_remote_code=trust_remote_code)
    tokenizer = loaded.tokenizer
    metadata = info.metadata if info is not None else None
    if metadata is None:
        # Adapters made elsewhere are often saved with a tokenizer from before templates.
        tokenizer.chat_template = tokenizer.chat_template or of_base.tokenizer.chat_template
    template = choose_template(
        tokenizer,
        of_base.model_type,
        options=metadata.template_options if metadata is not None else None,
    )
    if system is None and metadata is not None:
        system = metadata.system
    stop_ids = (metadata.stop_ids if metadata is not None else ()) or of_base.special.stop_ids
    pad_id = of_base.special.pad_id
    if metadata is not None and metadata.pad_id is not None:
        pad_id = metadata.pad_id
    encoder = Encoder(tokenizer, template, stop_ids=stop_ids, system=system)
    return Voice(encoder, pad_id, loaded)


def _assemble(
    base: str,
    info: AdapterInfo | None,
    system: str | None,
    compute: Compute,
    trust_remote_code: bool,
    force_base: bool,
) -> Speaker:
    of_base = load_tokenizer(base, trust_remote_code=trust_remote_code)
    voice = voice_of(info, of_base, system, trust_remote_code)
    forced: tuple[str, ...] = ()
    if info is not None:  # before the base takes its memory
        fingerprint = fingerprint_of(base, trust_remote_code=trust_remote_code)
        forced = voice.check(info, fingerprint, force_base)
    loaded = _load(base, compute, trust_remote_code)
    is_ours = info is not None and info.metadata is not None
    description = _describe(base, loaded.model, compute)
    if info is not None:
        # peft puts the adapter's layers into the model that it is given.
        load_adapter(loaded.model, info.folder)
    return Speaker(
        model=loaded.model,
        encoder=voice.encoder,
        pad_id=voice.pad_id,
        description=description,
        adapter=info.folder if info is not None else None,
        notes=(*forced, *loaded.notes, *(() if is_ours else of_base.special.notes)),
    )


def _load(base: str, compute: Compute, trust_remote_code: bool) -> LoadedModel:
    return load_model(
        base,
        dtype=getattr(torch, compute.dtype),
        device=torch.device(compute.device),
        trust_remote_code=trust_remote_code,
    )


def _describe(base: str, model: PreTrainedModel, compute: Compute) -> str:
    return (
        f"{base} ({model.config.model_type}, {_millions(model)} parameters, "
        f"{compute.dtype} on {compute.device})"
    )


def _millions(model: PreTrainedModel) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def find_adapter(source: str | None) -> Path | None:
    """The adapter folder that `source` means; None where it means a model.

    Raises ConfigError as `open_speaker` does.
    """
    if source is None:
        return newest_run().adapter
    path = Path(source).expanduser()
    if (path / CONFIG_FILE).is_file():
        return path
    run = RunDir(path)
    if (run.adapter / CONFIG_FILE).is_file():
        return run.adapter
    if run.config.is_file() or run.checkpoints.is_dir():
        raise ConfigError(_unfinished(run))
    if path.is_dir():
        if (path / "config.json").is_file():
            return None
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) or "nothing"
        raise ConfigError(
            f"{path} is neither a run (no adapter/), nor an adapter (no {CONFIG_FILE}), nor a "
            f"model (no config.json). It holds: {inside}.\n"
            "  Give one of these folders, or a hub id."
        )
    if path.exists():
        raise ConfigError(
            f"{path} is a file; expected a run directory, an adapter folder, a model folder or a "
            "hub id."
        )
    # `runs/nmae` has the shape of a hub id, but is meant for the folder that is here.
    if path.parent != Path() and path.parent.is_dir():
        raise ConfigError(
            f"{path}: there is no such folder.{_did_you_mean(path.name, path.parent)}"
        )
    if hint := _did_you_mean(source, RUNS):
        raise ConfigError(f"{source}: there is no such folder here.{hint}")
    return None


def _did_you_mean(name: str, folder: Path) -> str:
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"\n  Did you mean {folder / near[0]}?" if near else ""


def _unfinished(run: RunDir) -> str:
    steps = sorted(path.name for path in run.checkpoints.glob("step-*"))
    state = f"it was left after {steps[-1]}" if steps else "it has no checkpoint yet"
    return (
        f"{run.path}: this run is not finished: {state} and has no adapter to talk to.\n"
        f"  Finish it with `myna train {run.path}`."
    )


def find_base(info: AdapterInfo) -> str:
    """The base that an adapter names. Raises ConfigError where there is none or it is not found."""
    where = info.folder / CONFIG_FILE
    mend = f"base_model_name_or_path in {where}"
    if not info.base_model:
        raise ConfigError(
            f"{where} names no base model.\n  Write the folder or hub id of the base into {mend}."
        )
    try:
        find_folder(info.base_model, patterns=("config.json",))
    except ConfigError as error:
        raise ConfigError(
            f"{info.folder}: the base model of this adapter was not found.\n  {error}\n"
            f"  Put it back, or write where it is now into {mend}."
        ) from error
    return info.base_model
