"""The engine: one model in memory, one thread that decides what it computes.

Owns the queue of answers, their ends (stop ids, stop texts, limits, clients that left), and which
way each is computed:

    continuous   transformers' continuous batching: requests come and go at every token
    padded       batches through the model's own `generate`, collected while the last one runs;
                 where there is no continuous batching
    alone        one answer through `generate`: a seed, log-probabilities, or more tokens than the
                 cache of continuous batching has room for

A batch holds one model, base or adapter, and nothing else computes meanwhile. Whose batch is next
is `turns.py`'s, how continuous batching is driven `continuous.py`'s, and HTTP is not known here.
"""

import contextlib
import copy
import dataclasses
import itertools
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from myna.device import free_unused_memory
from myna.errors import MynaError
from myna.inference.generate import Sampling, answer_together
from myna.inference.server.continuous import Continuous, Unfit, check_agreement
from myna.inference.server.engine import (
    Busy,
    Event,
    Failed,
    Finished,
    Load,
    Piece,
    Stopping,
    Task,
    Token,
    TokenLogprob,
)
from myna.inference.server.limits import Limits
from myna.inference.server.names import BASE, Runs
from myna.inference.server.stop_text import StopText
from myna.inference.server.threads import leave_a_core
from myna.inference.server.turns import Turns
from myna.inference.speaker import SharedBase, Speaker, open_speakers
from myna.inference.text_stream import TextStream

_WAIT_SECONDS = 0.02
"""How long new requests may wait while nothing comes from those that are computed."""
_TIDY_SECONDS = 10.0
"""How often memory that answers have left is handed back: glibc keeps what was freed, in pieces of
every size that prompts and batches had."""
_LEAVING = "The server is about to end."


def open_engine(
    runs: Runs,
    *,
    limits: Limits | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    force_base: bool = False,
    note: Callable[[str], None] | None = None,
) -> "BatchingEngine":
    """Load what `runs` names and start to compute; `close` it in any case.

    `note` is told, in a sentence, what the person who runs it should know, then and later. The
    process computes with a thread fewer from here on where `leave_a_core` finds that to be better.

    Raises ConfigError as `open_speakers` does.
    """
    shared = open_speakers(
        runs.base,
        runs.adapters,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        force_base=force_base,
    )
    some = shared.base or next(iter(shared.speakers.values()))
    told = leave_a_core(some.model)
    if told is not None and note is not None:
        note(told)
    return BatchingEngine(shared, limits or Limits(), note=note)


class BatchingEngine:
    """Computes answers of the models on one base; see `engine.Engine`, whose shape this is.

    Raises NonFiniteError where the model's scores are no numbers.
    """

    def __init__(
        self,
        shared: SharedBase,
        limits: Limits,
        *,
        note: Callable[[str], None] | None = None,
        continuous: bool = True,
    ) -> None:
        speakers = dict(shared.speakers)
        if shared.base is not None:
            speakers[BASE] = shared.base
        self._models: Mapping[str, Speaker] = speakers
        self._switch = shared.switch
        self._limits = limits
        self._changed = threading.Condition()
        self._turns: Turns[_Answer] = Turns()
        self._running: list[_Answer] = []
        self._stopping = self._ended = False
        self._tidied = time.monotonic()
        self._device = next(iter(speakers.values())).model.device.type
        self._note = note or (lambda _: None)
        for text in shared.notes:
            self._note(text)
        self._continuous: Continuous | None = None
        if continuous:
            self._continuous = self._try_continuous()
        self._thread = threading.Thread(target=self._work, name="myna-engine", daemon=True)
        self._thread.start()

    @property
    def models(self) -> Mapping[str, Speaker]:
        """By the name that clients send."""
        return self._models

    @property
    def is_continuous(self) -> bool:
        """Whether requests come and go at every token, rather than in padded batches."""
        return self._continuous is not None

    def submit(self, tasks: Sequence[Task], tell: Callable[[int, Event], None]) -> "_Ticket":
        """Put all of `tasks` into the queue, or none; see `engine.Engine`."""
        answers = [
            _Answer(task, index, tell, self._models[task.model]) for index, task in enumerate(tasks)
        ]
        with self._changed:
            if self._stopping:
                raise Stopping
            if len(self._turns) + len(answers) > self._limits.waiting:
                raise Busy
            for answer in answers:
                answer.kind = self._kind(answer)
                self._turns.add(answer)
            self._changed.notify_all()
        return _Ticket(self, answers)

    def load(self) -> Load:
        """What there is to do at the moment."""
        with self._changed:
            return Load(len(self._turns), len(self._running))

    def stop_taking(self) -> None:
        """Refuse new tasks from now on, and what is not done `stop_seconds` later."""
        with self._changed:
            if self._stopping:
                return
            self._stopping = True
        timer = threading.Timer(self._limits.stop_seconds, self._give_up)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """End, whatever is being computed; its clients are told."""
        with self._changed:
            self._stopping = self._ended = True
        self._give_up()
        self._thread.join()
        if self._continuous is not None:
            self._continuous.close()

    def withdraw(self, answers: Sequence["_Answer"]) -> None:
        """Compute these no further."""
        with self._changed:
            for answer in answers:
                self._turns.remove(answer)
                answer.cancelled = True
            self._changed.notify_all()

    def _give_up(self) -> None:
        with self._changed:
            while (answer := self._turns.next()) is not None:
                self._turns.remove(answer)
                answer.fail(_LEAVING)
            for answer in self._running:
                answer.fail(_LEAVING)
            self._changed.notify_all()

    def _try_continuous(self) -> Continuous | None:
        name, speaker = next(iter(self._models.items()))
        continuous = None
        try:
            settings = [one.settings(Sampling()) for one in self._models.values()]
            if len({tuple(one.suppress_tokens or ()) for one in settings}) > 1:
                raise Unfit("the tokenizers of the models differ")
            continuous = Continuous(speaker, self._limits.batch)
            with continuous.paused():
                self._switch.use(_adapter(name))
            check_agreement(continuous, speaker)
        except Unfit as error:
            self._note(f"no continuous batching but padded batches, because {error}")
            if continuous is not None:
                continuous.close()
            return None
        except BaseException:
            if continuous is not None:
                continuous.close()
            raise
        return continuous

    def _kind(self, answer: "_Answer") -> Hashable:
        """What it may be computed together with; a truth value means continuously."""
        sampling, continuous = answer.task.sampling, self._continuous
        if sampling.seed is not None or answer.task.logprobs is not None:
            return object()  # alone: like nothing else
        if continuous is None:
            return dataclasses.replace(sampling, max_new_tokens=0)
        if len(answer.task.prompt_ids) + answer.limit > continuous.room:
            return object()
        return bool(answer.settings.do_sample)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._turns and not self._ended:
                    self._changed.wait()
                answer = self._turns.next()
            if answer is None:
                return
            try:
                if isinstance(answer.kind, bool) and self._continuous is not None:
                    self._answer_continuously(self._continuous, answer)
                else:
                    self._answer_padded(answer)
            except MynaError as error:
                self._fail_running(str(error).partition("\n")[0])
            except Exception:  # one batch fails, whatever it met; the server goes on
                traceback.print_exc()
                self._fail_running("The engine failed; the server's log says more.")
            self._tidy()

    def _tidy(self) -> None:
        if time.monotonic() - self._tidied > _TIDY_SECONDS:
            free_unused_memory(self._device)
            self._tidied = time.monotonic()

    def _fail_running(self, text: str) -> None:
        with self._changed:
            failed, self._running = self._running, []
        for answer in failed:
            answer.fail(text)
        self._replace_dead_engine()

    def _replace_dead_engine(self) -> None:
        if self._continuous is None or self._continuous.is_alive:
            return
        with self._changed:
            dead, self._continuous = self._continuous, None
            # What waits was to be computed continuously.
            waiting = []
            while (answer := self._turns.next()) is not None:
                self._turns.remove(answer)
                waiting.append(answer)
            for answer in waiting:
                answer.kind = self._kind(answer)
                self._turns.add(answer)
        dead.close()
        self._note("continuous batching has ended with an error: padded batches from here on")

    def _admit(
        self, like: "_Answer", count: int, fits: "Callable[[_Answer], bool] | None" = None
    ) -> "list[_Answer]":
        with self._changed:
            taken = self._turns.take(like, count, fits)
            self._running += taken
            return taken

    def _release(self, answer: "_Answer") -> None:
        with self._changed:
            if answer in self._running:
                self._running.remove(answer)

    @contextlib.contextmanager
    def _own_model(self, name: str) -> Iterator[None]:
        """The model with this adapter, its own attention, and nothing else computing."""
        with self._continuous.paused() if self._continuous else contextlib.nullcontext():
            self._switch.use(_adapter(name))
            yield

    def _answer_continuously(self, continuous: Continuous, first: "_Answer") -> None:
        """Answer what has the model and kind of `first`, for a turn or until nothing is left."""
        if self._switch.active != _adapter(first.model):
            with continuous.paused():
                self._switch.use(_adapter(first.model))
        sampled = bool(first.kind)
        begun: float | None = None
        running: dict[str, _Answer] = {}
        try:
            while True:
                self._tidy()
                with self._changed:
                    contended = self._turns.others_wait(first)
                admits = begun is None or time.monotonic() - begun < self._limits.turn_seconds
                begun = begun or time.monotonic()
                if admits or not contended:
                    for answer in self._admit(first, self._limits.batch - len(running)):
                        running[answer.name] = answer
                        ids, settings = answer.task.prompt_ids, answer.settings
                        continuous.add(answer.name, ids, settings, answer.limit)
                for name, answer in list(running.items()):
                    if answer.is_over:
                        continuous.cancel(name, sampled=sampled)
                        del running[name]
                        self._release(answer)
                if not running:
                    return
                if not continuous.is_alive:
                    raise RuntimeError("transformers' continuous batching has ended")
                for told in continuous.progress(sampled=sampled, wait_seconds=_WAIT_SECONDS):
                    found = running.get(told.request)
                    if found is None:
                        continue
                    if told.error is not None:
                        found.fail("The engine failed; the server's log says more.")
                    for token_id in told.ids[found.num_tokens :]:
                        found.take(token_id)
                    if found.has_ended:  # by itself, or by a stop text
                        if not found.ended_itself:
                            continuous.cancel(told.request, sampled=sampled)
                        del running[told.request]
                        self._release(found)
        finally:
            for name in running:  # left by an error
                continuous.cancel(name, sampled=sampled)

    def _answer_padded(self, first: "_Answer") -> None:
        """Answer what may be computed together with `first` in one padded batch."""
        speaker = first.speaker
        longest = limit = 0

        def fits(answer: _Answer) -> bool:
            """Whether the padded rows, and each row's answer, have room in the context."""
            nonlocal longest, limit
            prompt, tokens = max(longest, len(answer.task.prompt_ids)), max(limit, answer.limit)
            if longest and speaker.context is not None and prompt + tokens > speaker.context:
                return False
            longest, limit = prompt, tokens
            return True

        answers = self._admit(first, self._limits.batch, fits)
        settings = copy.copy(first.settings)
        settings.max_new_tokens = limit
        watch = None
        if first.task.logprobs is not None:
            watch = _Likeliest(first, first.task.logprobs, speaker.tokenizer)

        def take(ids: Sequence[int]) -> None:
            for answer, token_id in zip(answers, ids, strict=True):
                if not answer.is_over:
                    answer.take(token_id, watch.token(token_id) if watch else None)
                if answer.is_over:
                    self._release(answer)

        def ended() -> list[bool]:
            # Asked before the last ids are told: a row at its limit has one more to come.
            return [answer.is_over or answer.num_tokens + 1 >= answer.limit for answer in answers]

        try:
            with self._own_model(first.model):
                answer_together(
                    speaker.model,
                    speaker.tokenizer,
                    [answer.task.prompt_ids for answer in answers],
                    settings,
                    seed=first.task.sampling.seed,
                    take=take,
                    ended=ended,
                    watch=watch,
                )
            for answer in answers:
                answer.stop_here()
        finally:
            for answer in answers:
                if answer.is_over:
                    self._release(answer)


class _Ticket:
    """See `engine.Ticket`."""

    def __init__(self, engine: BatchingEngine, answers: "Sequence[_Answer]") -> None:
        self._engine = engine
        self._answers = answers

    def cancel(self) -> None:
        """End the answers that have not ended."""
        self._engine.withdraw([answer for answer in self._answers if not answer.has_ended])


class _Answer:
    """One answer, from its place in the queue to its last event."""

    _numbers = itertools.count()

    def __init__(
        self,
        task: Task,
        index: int,
        tell: Callable[[int, Event], None],
        speaker: Speaker,
    ) -> None:
        self.task = task
        self.name = f"answer-{next(self._numbers)}"
        self.speaker = speaker
        self.kind: Hashable = None
        """What it may be computed together with; the engine says it."""
        self.settings = speaker.settings(task.sampling)
        self.limit = task.sampling.max_new_tokens
        self.num_tokens = 0
        self.cancelled = False
        """Nobody waits for it any more."""
        self.has_ended = False
        """The last event was told."""
        self.ended_itself = False
        """By a stop id or its limit, which whoever draws its tokens sees too."""
        self._index = index
        self._tell = tell
        self._stop_ids = frozenset(self.settings.eos_token_id)
        self._stream = TextStream(speaker.tokenizer)
        self._stop = StopText(task.stop)
        self._text: list[str] = []
        self._ending = threading.Lock()

    @property
    def model(self) -> str:
        """The name of its model."""
        return self.task.model

    @property
    def is_over(self) -> bool:
        """Whether no more tokens of it are wanted."""
        return self.cancelled or self.has_ended

    def take(self, token_id: int, token: Token | None = None) -> None:
        """One more id, with its log-probability where that was asked for."""
        if self.is_over:
            return
        self.num_tokens += 1
        if token_id in self._stop_ids:
            self.ended_itself = True
            self._say(self._stop.push(self._stream.finish()))
            self._finish("stop")
            return
        self._say(self._stop.push(self._stream.push(token_id)), token)
        at_limit = self.num_tokens >= self.limit
        if at_limit and not self._stop.found:
            self._say(self._stop.push(self._stream.finish()))
        self.ended_itself = at_limit
        if self._stop.found:
            self._finish("stop")
        elif at_limit:
            self._finish("length")

    def stop_here(self) -> None:
        """The model's settings ended it, by something that is no token (`stop_strings`)."""
        if not self.is_over:
            self._say(self._stop.push(self._stream.finish()))
            self._finish("stop")

    def fail(self, text: str) -> None:
        """There will be no more of it."""
        self._end(Failed(text))

    def _say(self, text: str, token: Token | None = None) -> None:
        if text or token is not None:
            self._text.append(text)
            self._tell(self._index, Piece(text, (token,) if token is not None else ()))

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        if not self._stop.found:
            self._say(self._stop.finish())
        self._end(Finished(reason, self.num_tokens, "".join(self._text)))

    def _end(self, event: Event) -> None:
        with self._ending:  # the engine's thread, and one that gives up
            if self.has_ended:
                return
            self.has_ended = True
        self._tell(self._index, event)


class _Likeliest(LogitsProcessor):
    """Notes the log-probabilities of the likeliest tokens, and of whichever is drawn."""

    def __init__(self, answer: _Answer, count: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self._count = count
        self._tokenizer = tokenizer
        self._before = answer.task.prompt_ids[-1]
        self._logprobs = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._logprobs = torch.log_softmax(scores[0].float(), dim=-1)
        return scores

    def token(self, token_id: int) -> Token:
        """The token that was drawn, with the likeliest in its place."""
        best = torch.topk(self._logprobs, min(self._count, len(self._logprobs)))
        # Rows that belong to no token can never be drawn, and have none.
        possible = best.indices[best.values.isfinite()].tolist()
        likeliest = tuple(self._of(other) for other in possible)
        token = Token(self._of(token_id), likeliest)
        self._before = token_id
        return token

    def _of(self, token_id: int) -> TokenLogprob:
        """Text as it stands behind the token before: a first word has no space of its own."""
        before, both = self._decode(self._before), self._decode(self._before, token_id)
        text = both[len(before) :] if both.startswith(before) else self._decode(token_id)
        return TokenLogprob(text, float(self._logprobs[token_id]))

    def _decode(self, *ids: int) -> str:
        text = self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "one sequence of ids decodes to one text"
        return text


def _adapter(name: str) -> str | None:
    return None if name == BASE else name
