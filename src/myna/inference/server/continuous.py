"""Continuous batching: transformers' engine, where it does what the model itself does.

Owns what that engine is told, the room it has for keys and values, and the check at the start that
its answers are those of the model's own `generate`. Where it cannot be had for a model or a device,
a `Unfit` says why, and `batching.py` answers in padded batches instead. Scheduling, paged caches
and sampling are transformers'. Two managers are kept: its choice between greedy and sampling is one
for all requests of a manager.

Blocks of keys and values are never shared between requests: the engine knows equal tokens, but not
that another adapter computed them.
"""

# mypy: untyped-calls-exclude="transformers,torch"
# (transformers annotates few of its return types.)

import contextlib
import copy
import logging
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)

from myna.data.conversation import Message
from myna.device import memory_available
from myna.inference.generate import Sampling, answer_together
from myna.inference.server.by_request import attend_by_request
from myna.inference.speaker import Speaker
from myna.models.load import context_length, quiet_transformers

PAGE_TOKENS = 32
"""Tokens of a block of the cache: small, since a request takes whole ones."""
STEP_TOKENS = 256
"""Tokens computed at once: longer prompts come in parts, between which others go on."""
USUAL_TOKENS = 2048
"""Room for each answer that is computed at once, where the context is longer and memory there."""
MEMORY_SHARE = 0.25
"""Part of the free memory that the caches of both managers may take."""

_PROBE_TOKENS = 8
_PROBE = "What is said here does not matter: it is long enough to fill several pages of a cache. "
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""By how much the score of the engine's token may be below the best of the model's own: sums are
added up in another order. Two bfloat16 scores around 30 differ by 0.25 at least."""

_ELEMENTWISE = ("SuppressTokensLogitsProcessor",)
"""Processors that transformers has not marked, and that look at one row of scores alone."""


class Unfit(Exception):
    """Why there is no continuous batching, in words that follow "because"."""


@dataclass(frozen=True)
class Progress:
    """What became of a request since it was last heard of."""

    request: str
    ids: tuple[int, ...]
    """All its new ids so far."""
    error: str | None


class Continuous:
    """Two managers on one model, greedy and sampling. Raises Unfit where they cannot be had.

    Everything but `paused` is for the one thread that owns the engine.
    """

    def __init__(self, speaker: Speaker, batch: int) -> None:
        self._model = speaker.model
        self._batch = batch
        self._attention = self._model.config._attn_implementation
        settings = speaker.settings(Sampling(temperature=0))
        self._tokens = _cache_tokens(self._model, batch)
        self.room = self._tokens - PAGE_TOKENS
        """Most tokens that a request may have, prompt and answer together."""
        self._one_at_a_time = _OneAtATime(self._model)
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        self._managers: dict[bool, Any] = {}
        try:
            for sampled in (False, True):
                manager = self._open(settings, batch, sampled=sampled)
                self._managers[sampled] = manager
                manager.start()
        except BaseException as error:
            self.close()  # its threads would keep the program from ending
            if isinstance(error, Unfit) or not isinstance(error, Exception):
                raise
            # Of whatever kind: the library's own, for models it has not met.
            raise Unfit(f"transformers cannot: {_one_line(error)}") from error

    def _open(self, settings: GenerationConfig, batch: int, *, sampled: bool) -> Any:
        if not hasattr(ContinuousBatchingManager, "pause"):  # 5.17 has none
            raise Unfit("this version of transformers cannot pause its engine; update it")
        attend_by_request()
        model: Any = self._model
        settings = copy.deepcopy(settings)
        if sampled:
            # Values of no use but that they differ from the neutral ones: transformers makes a
            # step for each, which then takes every request's own value.
            settings.do_sample, settings.temperature = True, 2.0
            settings.top_k, settings.top_p = 2, 0.5
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=self._tokens // PAGE_TOKENS,
            max_batch_tokens=max(STEP_TOKENS, batch),
            max_requests_per_batch=batch,
            max_memory_percent=1.0,
            allow_block_sharing=False,
            use_cuda_graph=False,
            use_async_batching=False,
            # Other kernels than chat's, fetched from the hub where they are not installed.
            auto_switch_to_flash=False,
            per_request_processors=True,
            drop_unsupported_processors=False,
        )
        with quiet_transformers(), warnings.catch_warnings(action="ignore"):
            manager = model.init_continuous_batching(
                generation_config=settings, continuous_batching_config=config
            )
            if bad := _unsupported(manager.logit_processor.logits_processor):
                raise Unfit(
                    f"the base's generation settings ask for {bad}, which transformers' continuous "
                    "batching leaves out"
                )
            manager.warmup()
        return manager

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing computes inside the block, and the model has its own attention."""
        with contextlib.ExitStack() as stack:
            for manager in self._managers.values():
                if manager.is_running():
                    stack.enter_context(manager.pause())
            theirs = self._model.config._attn_implementation
            if theirs == self._attention:
                yield
                return
            self._model.set_attn_implementation(self._attention)
            try:
                yield
            finally:
                self._model.set_attn_implementation(theirs)

    def add(
        self, request: str, prompt_ids: Sequence[int], settings: GenerationConfig, limit: int
    ) -> None:
        """Begin to answer; `settings` are those of the request's speaker for its sampling."""
        own: dict[str, Any] = {}
        if settings.do_sample:
            everything = int(self._model.get_output_embeddings().weight.shape[0])
            own = {
                "temperature": float(settings.temperature),
                "top_k": min(settings.top_k or everything, everything),
                "top_p": float(settings.top_p),
            }
        self._managers[settings.do_sample].add_request(
            list(prompt_ids),
            request_id=request,
            max_new_tokens=limit,
            streaming=True,
            eos_token_id=list(settings.eos_token_id),
            **own,
        )

    def cancel(self, request: str, *, sampled: bool) -> None:
        """Go on with this request no further than the token in work."""
        self._managers[sampled].cancel_request(request)

    def progress(self, *, sampled: bool, wait_seconds: float) -> Iterator[Progress]:
        """What there is to tell, of one step or two; waits for the first of it."""
        manager = self._managers[sampled]
        for _ in range(2 * self._batch):  # and then a look at who else came
            output = manager.get_result(timeout=wait_seconds)
            if output is None:
                return
            yield Progress(output.request_id, tuple(output.generated_tokens), output.error)
            wait_seconds = 0

    @property
    def is_alive(self) -> bool:
        """Whether both managers run; one that met an error has ended."""
        return all(manager.is_running() for manager in self._managers.values())

    def close(self) -> None:
        """End the managers and give the model its own attention back."""
        for manager in self._managers.values():
            with contextlib.suppress(RuntimeError):
                manager.stop(block=True, timeout=10, hard_stop=True)
        self._one_at_a_time.end()
        if self._model.config._attn_implementation != self._attention:
            self._model.set_attn_implementation(self._attention)


class _OneAtATime:
    """Lets no two threads compute with the model at once.

    A manager goes on for a token after a request of its was withdrawn, while the other one begins.
    transformers (5.23, `merge_with_config_defaults`) writes `is_causal` into the model's config for
    the time of a forward, and two that overlap leave it there: from then on, the model's own
    answers would be computed as if a token saw those behind it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._lock = threading.RLock()
        self._hooks = (
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._finish, always_call=True),
        )

    def end(self) -> None:
        """Let them do as they like again."""
        for hook in self._hooks:
            hook.remove()

    def _begin(self, *_: Any) -> None:
        self._lock.acquire()

    def _finish(self, *_: Any) -> None:
        self._lock.release()


def check_agreement(continuous: Continuous, speaker: Speaker) -> None:
    """Raise Unfit unless the engine answers two prompts at once as the model does one by one.

    The model has to be the one of `speaker` by then. One prompt is short, the other longer than a
    page, and longer than a sliding window if that is a short one.
    """
    settings = speaker.settings(Sampling(temperature=0, max_new_tokens=_PROBE_TOKENS))
    prompts = [speaker.encoder.prompt([Message("user", text)]).ids for text in _probes(speaker)]
    most = continuous.room - _PROBE_TOKENS
    prompts = [ids for ids in prompts if len(ids) <= most]
    if not prompts:
        return
    expected = []
    with continuous.paused():
        for ids in prompts:
            expected.append(_own_scores(speaker, ids, settings))
    for number, ids in enumerate(prompts):
        continuous.add(f"probe-{number}", ids, settings, _PROBE_TOKENS)
    found: dict[str, Progress] = {}
    stops = set(settings.eos_token_id)
    waiting = {f"probe-{number}" for number in range(len(prompts))}
    while waiting:
        if not continuous.is_alive:
            raise Unfit("transformers' engine ended with an error")
        for told in continuous.progress(sampled=False, wait_seconds=0.2):
            if told.error is not None:
                raise Unfit(f"transformers' engine failed: {_one_line(told.error)}")
            found[told.request] = told
            if len(told.ids) >= _PROBE_TOKENS or (told.ids[-1:] and told.ids[-1] in stops):
                waiting.discard(told.request)
    tolerance = _TOLERANCE.get(speaker.model.dtype, 0.5)
    for number, scores in enumerate(expected):
        for at, (token_id, row) in enumerate(
            zip(found[f"probe-{number}"].ids, scores, strict=False)
        ):
            gap = float(row.max() - row[token_id])
            if not gap <= tolerance:
                raise Unfit(
                    f"it answers otherwise than the model itself: token {at + 1} of a trial answer "
                    f"scores {gap:.3g} below the best"
                )
            if token_id != int(row.argmax()):
                break  # from here on the two go different ways, both right


class _Keep(LogitsProcessor):
    """Keeps the scores of every step."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.rows.append(scores[0].detach().clone())
        return scores


def _own_scores(speaker: Speaker, ids: Sequence[int], settings: GenerationConfig) -> list[Tensor]:
    keep = _Keep()
    answer_together(
        speaker.model,
        speaker.tokenizer,
        [ids],
        settings,
        seed=0,
        take=lambda _: None,
        ended=lambda: [False],
        watch=keep,
    )
    return keep.rows


def _probes(speaker: Speaker) -> tuple[str, str]:
    window = getattr(speaker.model.config.get_text_config(), "sliding_window", None) or 0
    pages = window + PAGE_TOKENS if window <= 1024 else 2 * PAGE_TOKENS
    tokens = max(1, len(speaker.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]))
    return "?", _PROBE * math.ceil(max(pages, 2 * PAGE_TOKENS) / tokens)


def _cache_tokens(model: PreTrainedModel, batch: int) -> int:
    """Tokens whose keys and values each manager has room for, whole pages. Raises Unfit."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    # And a column of the mask, a read index, and what the library plans for reading.
    size += max(STEP_TOKENS, batch) * model.dtype.itemsize + 64
    context = context_length(model.config) or USUAL_TOKENS
    affordable = int(MEMORY_SHARE * memory_available(model.device.type) / size / 2)
    tokens = min(
        max(context, batch * min(context, USUAL_TOKENS) // 2) + 2 * PAGE_TOKENS, affordable
    )
    if tokens < min(context, USUAL_TOKENS):
        raise Unfit(f"a quarter of the free memory holds keys and values of {tokens:,} tokens only")
    return tokens // PAGE_TOKENS * PAGE_TOKENS


def _unsupported(processors: Sequence[Any]) -> str:
    """Names of steps that the engine would leave out or compute wrongly; empty for none."""
    names = [
        type(processor).__name__.removesuffix("LogitsProcessor")
        for processor in processors
        if not isinstance(processor, ContinuousBatchingLogitsProcessor)
        and getattr(processor, "supports_continuous_batching", None) is not True
        and type(processor).__name__ not in _ELEMENTWISE
    ]
    return ", ".join(names)


def _one_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
