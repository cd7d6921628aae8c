"""Generation: prompt ids in, answers out, one as a stream or many in batches.

Owns what transformers' `generate` is told: the base's own generation settings with the user's on
top, every stop id, the ids that may never be drawn, left padding, the limit of the context, and
the random numbers. Sampling and the key/value cache are transformers'. Prompts are made by
`data.encode`; loading is left to `speaker.py`, conversations to `chat.py`.

B rows, T tokens.
"""

# mypy: untyped-calls-exclude="transformers,torch"
# (transformers annotates few of its return types.)

import contextlib
import copy
import queue
import secrets
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from myna.errors import ConfigError, DataError, NonFiniteError, OutOfMemoryError
from myna.inference.text_stream import TextStream, decode
from myna.models.load import context_length, quiet_transformers

DEFAULT_TOP_K = 50
"""transformers' value where sampling is asked for and the base's settings have none."""
COLDEST = 1e-5
"""Below it a temperature is 0: only scores that are equal to float32's last digits could be drawn
otherwise, and dividing by less than 1e-36 makes them infinite."""


@dataclass(frozen=True)
class Sampling:
    """What the user asks for; None leaves a value to the base's `generation_config`."""

    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float | None = None
    """0 (and less than `COLDEST`) is greedy; any other value turns sampling on."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int | None = None
    """Draw from so many likeliest tokens; 0 is all."""
    repetition_penalty: float | None = None
    """Above 1: tokens of prompt and answer become less likely."""
    seed: int | None = None
    """Makes sampling repeatable; None draws anew each time."""


@dataclass(frozen=True)
class Answer:
    """One answer."""

    text: str
    """Decoded, without control tokens."""
    ids: tuple[int, ...]
    """New ids without the stop id."""
    stopped: bool
    """Whether the model ended it; otherwise it was cut or interrupted."""
    limit: int
    """Most new tokens there was room for."""


def settle(
    base: GenerationConfig,
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    unknown_ids: Sequence[int] = (),
) -> GenerationConfig:
    """The settings that decide an answer: `base` with `sampling` on top.

    Answers end at `stop_ids` and at the base's own end ids; `unknown_ids` are never drawn. Raises
    ConfigError for options that contradict each other.
    """
    narrowing = [
        f"--{name.replace('_', '-')} {value}"
        for name in ("top_p", "top_k")
        if (value := getattr(sampling, name)) is not None
    ]
    if sampling.temperature == 0 and narrowing:
        raise ConfigError(
            f"{' and '.join(narrowing)} with temperature 0: greedy answers always take the "
            "likeliest token, so this would do nothing.\n  Leave one of them out."
        )
    settings = copy.deepcopy(base)
    temperature = _first(sampling.temperature, base.temperature, 1.0)
    if temperature < COLDEST:
        settings.do_sample = False
    elif sampling.temperature is not None or narrowing:
        settings.do_sample = True
    settings.do_sample = bool(settings.do_sample)
    if settings.do_sample:
        settings.temperature = temperature
        settings.top_p = _first(sampling.top_p, base.top_p, 1.0)
        settings.top_k = _first(sampling.top_k, base.top_k, DEFAULT_TOP_K)
    settings.repetition_penalty = _first(sampling.repetition_penalty, base.repetition_penalty, 1.0)
    settings.eos_token_id = sorted({*stop_ids, *_as_list(base.eos_token_id)})
    settings.pad_token_id = pad_id
    settings.suppress_tokens = sorted({*unknown_ids, *_as_list(base.suppress_tokens)}) or None
    settings.num_beams = settings.num_return_sequences = 1
    settings.use_cache = True
    settings.return_dict_in_generate = False
    settings.max_new_tokens = sampling.max_new_tokens
    return settings


def describe(settings: GenerationConfig) -> str:
    """`greedy`, or `temperature 0.8, top-p 0.95, top-k 50`: for the person at the terminal."""
    parts = ["greedy"]
    if settings.do_sample:
        parts = [f"temperature {settings.temperature:g}"]
        parts += [f"top-p {settings.top_p:g}"] if settings.top_p < 1 else []
        parts += [f"top-k {settings.top_k}"] if settings.top_k else []
        parts += [f"min-p {settings.min_p:g}"] if settings.min_p else []
    if settings.repetition_penalty != 1:
        parts.append(f"repetition penalty {settings.repetition_penalty:g}")
    return ", ".join(parts)


def unknown_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the output head scores and the tokenizer has no token for (padding of the table)."""
    known = set(tokenizer.get_vocab().values())
    return [token_id for token_id in range(_rows(model)) if token_id not in known]


def room_for_answer(model: PreTrainedModel, prompt_ids: Sequence[int], max_new_tokens: int) -> int:
    """Tokens an answer to this prompt may have, at most `max_new_tokens`.

    Raises DataError where the prompt alone fills the context, or has ids the model has no row for.
    """
    rows = _rows(model)
    if (largest := max(prompt_ids)) >= rows:
        raise DataError(
            f"the prompt has the token id {largest} and the model has {rows:,} rows (ids 0 to "
            f"{rows - 1}): tokenizer and model do not belong together."
        )
    context = context_length(model.config)
    if context is None:
        return max_new_tokens
    if len(prompt_ids) >= context:
        raise DataError(
            f"the prompt has {len(prompt_ids):,} tokens and the model's context holds {context:,}, "
            "prompt and answer together.\n  Shorten it."
        )
    return min(max_new_tokens, context - len(prompt_ids))


def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    settings: GenerationConfig,
    *,
    seed: int | None = None,
) -> Generator[str, None, Answer]:
    """Yield an answer piece by piece; the generator's return value is the whole `Answer`.

    The model runs in a thread of its own; closing the generator, or a Ctrl-C while waiting for
    a piece, ends it after the token in work. Raises DataError for a prompt longer than the context,
    NonFiniteError and OutOfMemoryError.
    """
    settings = copy.deepcopy(settings)
    limit = room_for_answer(model, prompt_ids, settings.max_new_tokens)
    settings.max_new_tokens = limit
    arrivals: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
    halt = threading.Event()

    def work() -> None:
        try:
            _run(
                model,
                tokenizer,
                [prompt_ids],
                settings,
                seed,
                _Tap(lambda ids: arrivals.put(ids[0])),
                _Halt(lambda: [halt.is_set()]),
            )
        except BaseException as error:  # re-raised where the pieces are read
            arrivals.put(error)
        else:
            arrivals.put(None)

    stops = set(settings.eos_token_id)
    ids: list[int] = []
    text = TextStream(tokenizer)
    stopped = False
    worker = threading.Thread(target=work, name="myna-generate", daemon=True)
    worker.start()
    pieces = []
    try:
        while (arrival := arrivals.get()) is not None:
            if isinstance(arrival, BaseException):
                raise arrival
            stopped = arrival in stops
            if not stopped:
                ids.append(arrival)
                if piece := text.push(arrival):
                    pieces.append(piece)
                    yield piece
        if piece := text.finish():
            pieces.append(piece)
            yield piece
    finally:
        halt.set()
        worker.join()
    return Answer("".join(pieces), tuple(ids), stopped, limit)


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    *,
    batch_size: int,
    seed: int | None = None,
) -> Iterator[tuple[int, Answer]]:
    """Yield (index of the prompt, answer) for every prompt, longest prompts first.

    Prompts of like length are answered together, at most `batch_size` at once, padded on the left.
    Greedy answers do not depend on `batch_size` beyond rounding; sampled ones do, for the rows of
    a batch share their random numbers. Raises DataError for a prompt longer than the context,
    before the first answer, NonFiniteError and OutOfMemoryError.
    """
    limits = [room_for_answer(model, ids, settings.max_new_tokens) for ids in prompts]
    stops = set(settings.eos_token_id)
    for number, batch in enumerate(_batches(prompts, limits, settings.max_new_tokens, batch_size)):
        settings_of_batch = copy.deepcopy(settings)
        limit = settings_of_batch.max_new_tokens = limits[batch[0]]
        new_ids = _run(
            model,
            tokenizer,
            [prompts[index] for index in batch],
            settings_of_batch,
            None if seed is None else seed + number,
        )
        for index, row in zip(batch, new_ids.tolist(), strict=True):
            end = next((at for at, token_id in enumerate(row) if token_id in stops), len(row))
            text = decode(tokenizer, row[:end])
            yield index, Answer(text, tuple(row[:end]), end < len(row), limit)


def answer_together(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    *,
    seed: int | None,
    take: Callable[[Sequence[int]], None],
    ended: Callable[[], Sequence[bool]],
    watch: LogitsProcessor | None = None,
) -> None:
    """Answer prompts in one padded batch, telling every token as soon as it is drawn.

    `take` gets one new id for each prompt (for one that has ended, no matter which), and `ended`
    says for each whether more are wanted; it is asked before the ids just drawn are told. `watch`
    sees the scores (B, V) before temperature and top-p, and must not change them. Raises
    NonFiniteError, OutOfMemoryError, and what `take` and `ended` raise.
    """
    _run(
        model,
        tokenizer,
        prompts,
        settings,
        seed,
        _Tap(take),
        _Halt(ended),
        watch,
    )


def _batches(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], max_new_tokens: int, batch_size: int
) -> Iterator[list[int]]:
    """Indices of prompts to answer together, longest first so that memory fails early."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    # A row whose context ends before max_new_tokens is answered alone: in a batch it would cut
    # the answers of the others.
    alone = [index for index in order if limits[index] < max_new_tokens]
    yield from ([index] for index in alone)
    together = order[len(alone) :]
    for start in range(0, len(together), batch_size):
        yield together[start : start + batch_size]


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    seed: int | None,
    streamer: BaseStreamer | None = None,
    halt: StoppingCriteria | None = None,
    watch: LogitsProcessor | None = None,
) -> Tensor:
    """New ids (B, T) of one call of transformers' `generate`."""
    longest = max(len(ids) for ids in prompts)
    padded = [[settings.pad_token_id] * (longest - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    generate: Any = model.generate
    input_ids = torch.tensor(padded, device=model.device)
    attention_mask = torch.tensor(mask, device=model.device)
    # transformers warns about settings in the base's published files, which no user can mend.
    with (
        _evaluating(model),
        _own_random_numbers(seed, model.device),
        quiet_transformers(),
        warnings.catch_warnings(action="ignore"),
        torch.inference_mode(),
    ):
        try:
            sequences: Tensor = generate(
                input_ids,
                generation_config=settings,
                attention_mask=attention_mask,
                logits_processor=LogitsProcessorList(
                    [_Finite(longest, model.dtype), *([watch] if watch else [])]
                ),
                stopping_criteria=StoppingCriteriaList([halt] if halt else []),
                streamer=streamer,
                # Only read where the base's settings name stop_strings.
                tokenizer=tokenizer,
            )
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"{len(prompts)} prompt(s) of up to {longest:,} tokens with answers of up to "
                f"{settings.max_new_tokens:,}: out of memory on {model.device}.\n"
                "  Lower --max-new-tokens, or --batch-size of `myna generate`."
            ) from error
    return sequences[:, longest:]


class _Tap(BaseStreamer):
    """Passes new ids on; the first call brings the prompt."""

    def __init__(self, take: Callable[[Sequence[int]], None]) -> None:
        self._take = take
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if self._prompt_seen:
            self._take(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing: the thread says itself when it is done."""


class _Finite(LogitsProcessor):
    """Refuses scores that are no numbers: greedy choice would take some id without a word."""

    def __init__(self, prompt_tokens: int, dtype: torch.dtype) -> None:
        self._prompt_tokens = prompt_tokens
        self._dtype = str(dtype).removeprefix("torch.")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if torch.isnan(scores).any():
            raise NonFiniteError(
                f"The model's scores for new token {input_ids.shape[1] - self._prompt_tokens + 1} "
                f"are not numbers (NaN), computed in {self._dtype}.\n  The weights of the base or "
                "of the adapter are broken: fetch the base again, or train with a lower "
                "learning rate."
            )
        return scores


class _Halt(StoppingCriteria):
    """Ends rows for which nothing more is wanted."""

    def __init__(self, ended: Callable[[], Sequence[bool]]) -> None:
        self._ended = ended

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(self._ended(), device=input_ids.device)


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode (no dropout), and the mode of before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _own_random_numbers(seed: int | None, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed` (None: from the system), the global ones left as they were."""
    # torch keeps and restores the generators of CUDA devices and of the CPU, not that of mps.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # Without a seed of its own every process would draw the same answers: torch starts all
        # its generators from one constant.
        torch.manual_seed(secrets.randbits(63) if seed is None else seed)
        yield


def _rows(model: PreTrainedModel) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _as_list(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
