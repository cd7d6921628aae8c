"""Encoding: conversations to pairs of prompt ids and completion ids.

Owns the one place where a prompt is made, for training, chat and servers alike, and the rule by
which an answer becomes labels:

    prompt ids      the template over the messages before the answer, with the generation prompt,
                    tokenized without added special tokens: what vLLM and transformers'
                    `apply_chat_template(tokenize=True)` send. A BOS is there if the template writes
                    one; where it writes none, servers add none, and neither does this (said aloud).
    completion      the template over the messages with the answer, less the prompt text, up to and
                    including the first stop token.

Also here: what is refused, and over-long rows. What became of all rows is counted in `dataset.py`;
templates are `templates.py`, batches `loader.py`. Knows no files and no models.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from myna.data.conversation import Conversation, Message, Place, ToolCall
from myna.data.faults import Fault
from myna.data.rendering import STOPPED_MEND, TemplateError, TemplateStopped
from myna.data.store import Example
from myna.data.templates import ChatTemplate
from myna.errors import ConfigError, DataError

OverLength = Literal["error", "drop", "truncate_prompt"]
ControlTokens = Literal["error", "allow"]
TrainOn = Literal["assistant", "last"]

Ids = Callable[[Sequence[str]], list[list[int]]]
"""Texts to token ids, without added special tokens."""

_MIN_KEPT = 32
"""Characters of a user text that shortening leaves at least; less is no question any more."""

_GAP = " … "
"""Stands where the middle of a user text was taken out."""

_ANCHORS = ("", "\n", "a", "。", "0")
"""Texts behind which a completion is encoded alone; their own tokens are taken off again."""

_THINK_TAIL = re.compile(r"(?:<think>\s*)?(?:</think>\s*)?\Z")
"""What the generation prompt of a thinking model may end in, and its history lack."""

_EMPTY_THINKING = re.compile(r"\s*(?:<think>\s*)?</think>(\s*)")
"""How history may begin an answer whose thinking it leaves out."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt and its token ids."""

    text: str
    ids: tuple[int, ...]


class RowRefused(DataError):
    """A row that cannot be trained on; `reason` is a word for the accounting."""

    def __init__(
        self,
        reason: str,
        place: Place,
        finding: str,
        mend: str = "",
        *,
        kind: str | None = None,
        length: int = 0,
    ) -> None:
        self.reason = reason
        self.fault = Fault(kind or reason, place, finding, mend)
        self.length = length
        """Tokens of the longest answer with its context, where the row's length is the reason."""
        self.tokens = length
        """Tokens of all its answers, each with its context, then too."""
        super().__init__(str(self.fault))


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """The examples of a row, and how long it was before anything was taken out of it."""

    examples: list[tuple[Example, str | None]]
    """Each with a remark for the notes: what was done to its text beyond the template."""
    length: int
    """Tokens of the longest answer with its context."""
    tokens: int
    """Tokens of all answers, each with its context."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer to train, before it is rendered."""

    before: Sequence[Message]
    answer: Message
    tools: Sequence[Mapping[str, Any]] | None
    place: Place
    number: int


@dataclass(frozen=True, slots=True)
class _Turn:
    """An answer as text, before tokenization."""

    prompt_text: str
    completion_text: str
    of: _Answer
    remark: str | None
    """What was done to the text beyond the template, for the notes."""


@dataclass(frozen=True, slots=True)
class _Text:
    """A plain text, before tokenization."""

    text: str
    place: Place


class Encoder:
    """Renders and tokenizes conversations with one tokenizer and one template.

    Args:
        tokenizer: a transformers tokenizer.
        template: from `choose_template`.
        stop_ids: ids that generation stops on. See the attribute `stop_ids`.
        system: put in front of conversations and prompts without a system message of their own.
        max_length: longest example in tokens, prompt and completion; None: no limit.
        over_length: what happens to longer ones.
        limit_is_models: `max_length` is the most that the model was made for, not what a user set.
        control_tokens: what happens to a text that spells one of the tokenizer's control tokens.
        train_on: every answer that no flag of its row makes context, or only a row's last.

    Raises:
        ConfigError: tokenizer and template cannot give an answer that ends.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate,
        *,
        stop_ids: Sequence[int],
        system: str | None = None,
        max_length: int | None = None,
        over_length: OverLength = "error",
        control_tokens: ControlTokens = "error",
        limit_is_models: bool = False,
        train_on: TrainOn = "assistant",
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.stop_ids = tuple(stop_ids)
        """Those given, and what the template ends an answer with: generation has to stop on all."""
        self.system = system if system and system.strip() else None
        self.max_length = max_length
        self.over_length = over_length
        self.limit_is_models = limit_is_models
        self.control_tokens = control_tokens
        self.train_on = train_on
        self.notes = list(template.notes)
        if train_on == "last":
            self.notes.append("train_on is last: earlier answers of a conversation are context")
        self._renderers = {on: template.with_thinking(on) for on in (False, True)}
        self._control = _control_pattern(tokenizer, template)
        if self.system:
            self._check_system(self.system)
        self._settle_stop_ids()
        self._stop_set = frozenset(self.stop_ids)
        self._stop = _any_of(
            token.content
            for id_, token in tokenizer.added_tokens_decoder.items()
            if id_ in self._stop_set
        )
        self._check_bos()

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Prompt:
        """What the model is sent to answer `messages`; the same ids as in training.

        Raises:
            DataError: a text spells a control token, or the template does not accept the messages.
        """
        if found := self._find_control_token(messages, tools):
            _, finding, mend = found
            raise DataError(f"{_capital(finding)}\n  {mend}")
        try:
            text = self.template.render(
                self._with_system(messages), tools, add_generation_prompt=True
            )
        except TemplateError as error:
            raise DataError(f"The chat template does not accept these messages: {error}") from error
        return Prompt(text, tuple(self._ids([text])[0]))

    def text_prompt(self, text: str) -> Prompt:
        """A plain text to go on from, with the start token before it as in training.

        Raises:
            DataError: the text spells a control token, or has no tokens.
        """
        if found := self._control_token_in("the text", text):
            _, finding, mend = found
            raise DataError(f"{_capital(finding)}\n  {mend}")
        ids = self._ids([text])[0]
        if self.tokenizer.bos_token_id is not None:
            text, ids = self.tokenizer.bos_token + text, [self.tokenizer.bos_token_id, *ids]
        if not ids:
            raise DataError(
                "The text is empty, and the tokenizer has no start token; expected a text."
            )
        return Prompt(text, tuple(ids))

    def encode(self, conversation: Conversation) -> list[Example]:
        """One example per trained answer, in order.

        Raises:
            RowRefused: the row cannot be trained on as it is.
        """
        (outcome,) = self.encode_batch([conversation])
        if isinstance(outcome, RowRefused):
            raise outcome
        return [example for example, _ in outcome.examples]

    def encode_batch(
        self, conversations: Sequence[Conversation], ids: Ids | None = None
    ) -> list[EncodedRow | RowRefused]:
        """Per conversation its examples, or why it is refused.

        Args:
            conversations: any number; all their texts are tokenized by one call.
            ids: texts to their ids, to be used in place of the tokenizer itself.
        """
        rows = self._turns(conversations)
        turns = [turn for row in rows if isinstance(row, list) for turn in row]
        prompts = [turn.prompt_text for turn in turns]
        wholes = [turn.prompt_text + turn.completion_text for turn in turns]
        texts = [row.text for row in rows if isinstance(row, _Text)]
        all_ids = iter((ids or self._ids)([*prompts, *wholes, *texts]))
        prompt_ids, whole_ids = (iter(list(islice(all_ids, len(turns)))) for _ in range(2))
        outcomes: list[EncodedRow | RowRefused] = []
        for row in rows:
            if isinstance(row, RowRefused):
                outcomes.append(row)
                continue
            if isinstance(row, _Text):
                outcomes.append(self._encode_text(row, next(all_ids)))
                continue
            # Taken for all turns before any can be refused: the iterators stay in step.
            encoded = [(turn, next(prompt_ids), next(whole_ids)) for turn in row]
            outcomes.append(self._row(encoded))
        return outcomes

    def _row(
        self, encoded: Sequence[tuple[_Turn, list[int], list[int]]]
    ) -> EncodedRow | RowRefused:
        """One conversation, from its turns with the ids of prompt and whole."""
        try:
            made = [(turn, self._example(turn, *ids)) for turn, *ids in encoded]
        except RowRefused as refusal:
            return refusal
        lengths = [len(example.prompt_ids) + len(example.completion_ids) for _, example in made]
        try:
            fitting = [(self._fit(turn, example), turn.remark) for turn, example in made]
        except RowRefused as refusal:
            refusal.length, refusal.tokens = max(lengths), sum(lengths)
            return refusal
        return EncodedRow(fitting, max(lengths), sum(lengths))

    def _turns(
        self, conversations: Sequence[Conversation]
    ) -> list[list[_Turn] | _Text | RowRefused]:
        """Per conversation its trained answers as text; all are rendered together."""
        wanted: list[list[_Answer] | _Text | RowRefused] = []
        for conversation in conversations:
            try:
                wanted.append(
                    list(self._answers(conversation))
                    if conversation.text is None
                    else self._text(conversation.text, conversation.place)
                )
            except RowRefused as refusal:
                wanted.append(refusal)
        answers = [answer for row in wanted if isinstance(row, list) for answer in row]
        rendered = iter(self._render(answers))
        rows: list[list[_Turn] | _Text | RowRefused] = []
        for row in wanted:
            if not isinstance(row, list):
                rows.append(row)
                continue
            # Taken for all answers before any can be refused: the iterator stays in step.
            pairs = [(answer, next(rendered)) for answer in row]
            try:
                rows.append([self._turn(*pair) for pair in pairs])
            except RowRefused as refusal:
                rows.append(refusal)
        return rows

    def _answers(self, conversation: Conversation) -> Iterator[_Answer]:
        if found := self._find_control_token(conversation.messages, conversation.tools):
            kind, finding, mend = found
            raise RowRefused("control_token", conversation.place, finding, mend, kind=kind)
        messages = self._with_system(conversation.messages)
        answers = [at for at, message in enumerate(messages) if message.role == "assistant"]
        found_any = False
        for number, index in enumerate(answers, start=1):
            message = messages[index]
            if message.trained and (self.train_on == "assistant" or index == answers[-1]):
                found_any = True
                if not index:
                    raise RowRefused(
                        "nothing_before",
                        conversation.place,
                        "the first message is an answer that is to be trained, and nothing stands "
                        "before it.",
                        "Put a system or user message before it, or take its flag away.",
                    )
                yield _Answer(
                    messages[:index], message, conversation.tools, conversation.place, number
                )
        if not found_any:
            raise RowRefused(
                "nothing_trained",
                conversation.place,
                "the row has no answer that is trained.",
                "Add an answer or delete the row.",
            )

    def _render(self, answers: Sequence[_Answer]) -> list[tuple[str, str] | TemplateError]:
        """Per answer the prompt before it, and the conversation with it; or why there is none."""
        rendered = self._render_as_written(answers)
        moved = [
            index
            for index, (of, texts) in enumerate(zip(answers, rendered, strict=True))
            if not isinstance(texts, TemplateError) and _may_move_system(of.before, *texts)
        ]
        bare = self._render_as_written([_without_system(answers[index]) for index in moved])
        for index, texts in zip(moved, bare, strict=True):
            written = rendered[index]
            if not (isinstance(texts, TemplateError) or isinstance(written, TemplateError)):
                rendered[index] = _rejoin_system(answers[index].before, written, texts)
        return rendered

    def _render_as_written(
        self, answers: Sequence[_Answer]
    ) -> list[tuple[str, str] | TemplateError]:
        rendered: list[tuple[str, str] | TemplateError | None] = [None] * len(answers)
        for thinking, template in self._renderers.items():
            chosen = [
                index
                for index, of in enumerate(answers)
                if (of.answer.reasoning is not None) is thinking
            ]
            turns = [([*answers[i].before, answers[i].answer], answers[i].tools) for i in chosen]
            try:
                texts = template.render_answers(turns)
            except TemplateStopped as stop:
                place = answers[chosen[stop.index]].place
                raise DataError(
                    f"{place}: the chat template was stopped: {stop.why}.\n{STOPPED_MEND}"
                ) from stop
            for index, pair in zip(chosen, texts, strict=True):
                rendered[index] = pair
        return [pair for pair in rendered if pair is not None]

    def _turn(self, of: _Answer, texts: tuple[str, str] | TemplateError) -> _Turn:
        before, answer, tools, place = of.before, of.answer, of.tools, of.place
        if isinstance(texts, TemplateError):
            raise RowRefused(
                "template",
                place,
                f"the chat template does not accept the messages: {texts}",
                kind=f"template:{texts}",
            ) from texts
        prompt, whole = texts
        for message in (before[0], *_since_question(before)):
            if message.role != "assistant" and not _is_written(message.content, prompt):
                raise RowRefused(
                    "text_dropped",
                    place,
                    f"the chat template leaves out or changes the {message.role} text.",
                    f"It is {_excerpt(message.content)}; the prompt is {_excerpt(prompt)}",
                    kind=f"text_dropped:{message.role}",
                )
            _check_calls(message.tool_calls, prompt, place)
        if tools and not _mentions_tools(self.template):
            raise RowRefused(
                "tools_dropped",
                place,
                "the row has tools and the chat template knows none.",
                "Remove the tools, or set `template: FILE` to one that writes them.",
            )
        completion, remark = self._completion(prompt, whole, answer, place)
        return _Turn(prompt, completion, of, remark)

    def _completion(
        self, prompt: str, whole: str, answer: Message, place: Place
    ) -> tuple[str, str | None]:
        """The text to learn: what `whole` has behind `prompt`, up to its first stop token."""
        remark = None
        is_dropped = _opens_thinking(prompt) and not _has_reasoning(whole[len(prompt) :], answer)
        if whole.startswith(prompt) and not is_dropped:
            completion = whole[len(prompt) :]
        else:
            completion, remark = _join_thinking(prompt, whole, answer, place)
        _check_calls(answer.tool_calls, completion, place)
        calls = "".join(_as_json(call.arguments) for call in answer.tool_calls)
        if self._stop and (found := self._stop.search(calls)):
            raise _stop_in("tool call", found.group(), place)
        for name, text in (("answer", answer.content), ("reasoning", answer.reasoning or "")):
            is_there = text.strip() in completion
            if name == "reasoning":
                is_there = _has_reasoning(completion, answer)
            if not is_there:
                raise RowRefused(
                    f"{name}_dropped",
                    place,
                    f"the chat template leaves out or changes the {name}.",
                    f"It is {_excerpt(text)}; the template makes of it {_excerpt(completion)}",
                )
            if self._stop and (found := self._stop.search(text)):
                raise _stop_in(name, found.group(), place)
        if self._stop and (stop := self._stop.search(completion)):
            return completion[: stop.end()], remark
        eos = self.tokenizer.eos_token
        return completion + eos, (
            f'the chat template ends an answer with no stop token; "{eos}" was appended'
        )

    def _text(self, text: str, place: Place) -> _Text:
        if found := self._control_token_in("the text", text):
            kind, finding, mend = found
            raise RowRefused("control_token", place, finding, mend, kind=kind)
        return _Text(text, place)

    def _encode_text(self, row: _Text, ids: list[int]) -> EncodedRow | RowRefused:
        """A plain text: the start token, where there is one, is its context; then all is trained.

        The text is tokenized alone, as `tokenizer(text)` does, so that its first word gets the
        space that a sentencepiece tokenizer puts before it.
        """
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if end not in self._stop_set:
            end = self.stop_ids[0]
        start_text = "" if start is None else self.tokenizer.bos_token
        end_text = self.tokenizer.convert_ids_to_tokens(end)
        text = row.text
        # Where control tokens are allowed, a text may have its own.
        if start is not None and ids[:1] == [start] and text.startswith(start_text):
            ids, text = ids[1:], text[len(start_text) :]
        if ids[-1:] != [end]:
            ids, text = [*ids, end], text + end_text
        prompt_ids = () if start is None else (start,)
        length = len(prompt_ids) + len(ids)
        if self.max_length is not None and length > self.max_length:
            return RowRefused(
                "over_length",
                row.place,
                f"{length} tokens of plain text, and max_length is {self.max_length}; a text has "
                "no prompt that could be shortened.",
                length=length,
            )
        remark = f'plain texts are trained whole, from "{start_text}" to "{end_text}"'
        if start is None:
            remark = (
                f'plain texts are trained up to "{end_text}"; there is no start token, so nothing '
                "predicts their first token"
            )
        example = Example(start_text, text, prompt_ids, tuple(ids), row.place, 0)
        return EncodedRow([(example, remark)], length, length)

    def _fit(self, turn: _Turn, example: Example) -> Example:
        """The example of a turn, shortened if it must and may be."""
        length = len(example.prompt_ids) + len(example.completion_ids)
        if self.max_length is None or length <= self.max_length:
            return example
        if self.over_length == "truncate_prompt":
            shorter = self._drop_turns(turn) or self._shorten_text(turn)
            if shorter is not None:
                return shorter
        raise RowRefused(
            "over_length",
            turn.of.place,
            f"{length} tokens (prompt {len(example.prompt_ids)}, answer "
            f"{len(example.completion_ids)}), and max_length is {self.max_length}.",
            length=length,
        )

    def _example(self, turn: _Turn, prompt_ids: list[int], whole_ids: list[int]) -> Example:
        size = len(prompt_ids)
        if whole_ids[:size] == prompt_ids:
            completion_ids = whole_ids[size:]
        else:
            completion_ids = self._encode_alone(turn, prompt_ids, whole_ids)
        if not completion_ids or completion_ids[-1] not in self._stop_set:
            last = completion_ids[-1:]
            raise RowRefused(
                "no_stop",
                turn.of.place,
                f"the answer ends in {self.tokenizer.convert_ids_to_tokens(last)} (ids {last}), "
                f"which is none of the stop ids {sorted(self._stop_set)}.",
                "The model would not learn to stop; the tokenizer and its template do not fit.",
            )
        if not self._stop_set.isdisjoint(completion_ids[:-1]):
            raise RowRefused(
                "stop_in_answer",
                turn.of.place,
                "the answer contains a stop token before its end, where it would be cut.",
                "Remove it from the text.",
            )
        return Example(
            turn.prompt_text,
            turn.completion_text,
            tuple(prompt_ids),
            tuple(completion_ids),
            turn.of.place,
            turn.of.number,
            weight=turn.of.answer.weight,
        )

    def _encode_alone(self, turn: _Turn, prompt_ids: list[int], whole_ids: list[int]) -> list[int]:
        """Ids of the completion where a token of the whole text spans its border with the prompt.

        A model that answers starts behind the prompt's last token, so the border is kept. Behind an
        anchor no dummy prefix space is added; the decoded text decides which attempt is right.
        """
        whole_text = self._decode(whole_ids)
        for anchor in _ANCHORS:
            anchor_ids, joint_ids = self._ids([anchor, anchor + turn.completion_text])
            if joint_ids[: len(anchor_ids)] != anchor_ids:
                continue
            completion_ids = joint_ids[len(anchor_ids) :]
            if self._decode(prompt_ids + completion_ids) == whole_text:
                return completion_ids
        raise RowRefused(
            "boundary",
            turn.of.place,
            "prompt and answer cannot be tokenized apart without changing the text.",
            f"The prompt ends in {_excerpt(turn.prompt_text, tail=True)}, the answer is "
            f"{_excerpt(turn.completion_text)}",
        )

    def _drop_turns(self, turn: _Turn) -> Example | None:
        """Without as many of the oldest turns as it takes; system and last user turn stay."""
        head, turns = _split_turns(turn.of.before)
        for first in range(1, len(turns)):
            before = [*head, *(message for group in turns[first:] for message in group)]
            example = self._attempt(turn, before)
            if example is not None:
                return replace(example, truncated="turns_dropped")
        return None

    def _shorten_text(self, turn: _Turn) -> Example | None:
        """Only the last turn, its user text without as much of its middle as it takes."""
        head, turns = _split_turns(turn.of.before)
        if not turns:
            return None
        question, *rest = turns[-1]
        best = None
        low, high = _MIN_KEPT, len(question.content) - len(_GAP) - 1
        while low <= high:
            kept = (low + high) // 2
            front = (kept + 1) // 2
            text = question.content[:front] + _GAP + question.content[-(kept - front) :]
            shorter = replace(question, content=text)
            example = self._attempt(turn, [*head, shorter, *rest])
            if example is None:
                high = kept - 1
            else:
                best, low = example, kept + 1
        return None if best is None else replace(best, truncated="text_shortened")

    def _attempt(self, turn: _Turn, before: Sequence[Message]) -> Example | None:
        """The turn with other messages before it, if that fits."""
        of = replace(turn.of, before=before)
        made = self._turn(of, *self._render([of]))
        example = self._example(
            made, *self._ids([made.prompt_text, made.prompt_text + made.completion_text])
        )
        length = len(example.prompt_ids) + len(example.completion_ids)
        assert self.max_length is not None, "nothing is shortened without a limit"
        return example if length <= self.max_length else None

    def _with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        if self.system is None or (messages and messages[0].role == "system"):
            return messages
        return [Message("system", self.system), *messages]

    def _find_control_token(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[str, str, str] | None:
        """(kind, finding, mend) of the first control token in what people wrote."""
        if self.control_tokens == "allow" or self._control is None:
            return None
        number = 0
        texts: list[tuple[str, str]] = []
        for message in messages:
            number += message.role == "user"
            where = f" of turn {number}" if number else ""
            texts.append((f"the {message.role} text{where}", message.content))
            if message.reasoning is not None:
                texts.append((f"the reasoning{where}", message.reasoning))
            texts += [
                (f"the tool call{where}", _as_json([call.name, call.arguments]))
                for call in message.tool_calls
            ]
        if tools:
            texts.append(("the tools", _as_json(list(tools))))
        for name, text in texts:
            if found := self._control_token_in(name, text):
                return found
        return None

    def _control_token_in(self, name: str, text: str) -> tuple[str, str, str] | None:
        """(kind, finding, mend) of the first control token in a text that is called `name`."""
        if self.control_tokens == "allow" or self._control is None:
            return None
        match = self._control.search(text)
        if match is None:
            return None
        token = match.group()
        return (
            f"control_token:{token}:{name.split(' of ')[0]}",
            f'{name} contains "{token}" at character {match.start() + 1}, which the '
            "tokenizer reads as a control token; expected plain text.",
            "Remove or rewrite it, or set control_tokens: allow to have it read so.",
        )

    def _check_system(self, system: str) -> None:
        if found := self._find_control_token([Message("system", system)], None):
            token = found[0].split(":", 1)[1].rsplit(":", 1)[0]
            raise ConfigError(
                f'system contains "{token}", which the tokenizer reads as a control token; '
                "expected plain text.\n  Remove it: the chat template writes control tokens itself."
            )

    def _settle_stop_ids(self) -> None:
        """Add to `stop_ids` what the template, or else the tokenizer, ends an answer with."""
        answer = Message("assistant", "myna probe of the answer")
        try:
            whole = self.template.render(
                [Message("user", "myna probe of the question"), answer], add_generation_prompt=False
            )
        except TemplateError as error:
            raise ConfigError(
                f"The chat template ({self.template.origin}) cannot render an answer: {error}\n"
                "  Mend the template, or set `template: FILE` to another."
            ) from error
        if answer.content not in whole:
            raise ConfigError(
                f"The chat template ({self.template.origin}) leaves out the text of an answer; it "
                f"renders {_excerpt(whole)}\n"
                "  Mend the template, or set `template: FILE` to another."
            )
        tail = whole[whole.rindex(answer.content) + len(answer.content) :]
        found = self._control.search(tail) if self._control else None
        if found is not None:
            (ids,) = self._ids([found.group()])
            stop_id, why = ids[-1], "which ends an answer in the chat template"
        elif self.tokenizer.eos_token_id is not None:
            stop_id, why = self.tokenizer.eos_token_id, "the end-of-text token of the tokenizer"
        else:
            raise ConfigError(
                f"Neither the chat template ({self.template.origin}) nor the tokenizer has a token "
                "that ends an answer: a model trained so would never stop.\n"
                "  Set `template: FILE` to one that writes a stop token, or use a tokenizer with "
                "an eos token."
            )
        if stop_id not in self.stop_ids:
            token = self.tokenizer.convert_ids_to_tokens(stop_id)
            self.notes.append(
                f'the model does not name "{token}" ({stop_id}), {why}, among its stop tokens; it '
                "is added, in chat and in the saved adapter"
            )
            self.stop_ids = (*self.stop_ids, stop_id)

    def _check_bos(self) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return
        text = self.template.render([Message("user", "a")], add_generation_prompt=True)
        (ids,) = self._ids([text])
        token = self.tokenizer.bos_token
        if ids[:2] == [bos, bos]:
            raise ConfigError(
                f'The chat template ({self.template.origin}) writes "{token}" twice at the start: '
                f"{_excerpt(text)}\n  Mend the template; it has to stand there once."
            )
        if bos not in ids and self.tokenizer("a")["input_ids"][:1] == [bos]:
            self.notes.append(
                f'the chat template writes no "{token}"; servers add none to a rendered chat, so '
                "training and chat go without"
            )

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def _may_move_system(before: Sequence[Message], prompt: str, whole: str) -> bool:
    """Whether the prompt is gone from the conversation with the answer, and not for thinking."""
    is_gone = not whole.startswith(prompt) and not _opens_thinking(prompt)
    return is_gone and before[0].role == "system"


def _without_system(of: _Answer) -> _Answer:
    return replace(of, before=of.before[1:])


def _rejoin_system(
    before: Sequence[Message], written: tuple[str, str], bare: tuple[str, str]
) -> tuple[str, str]:
    """`written` with the answer behind the prompt, for templates that move the system text.

    Mistral's writes it into the last message if that is a question, so that it is gone once the
    answer stands there. What follows the generation prompt is then read off `bare`, which has no
    system text, if the question is followed by the same in both.
    """
    prompt, (bare_prompt, bare_whole) = written[0], bare
    question = before[-1].content.strip()
    same_tail = prompt.rpartition(question)[2] == bare_prompt.rpartition(question)[2]
    if bare_whole.startswith(bare_prompt) and same_tail:
        return prompt, prompt + bare_whole[len(bare_prompt) :]
    return written


def _has_reasoning(completion: str, answer: Message) -> bool:
    """Whether the reasoning stands in front of the answer; being part of its text is not enough."""
    text = answer.content.strip()
    front = completion.rpartition(text)[0] if text else completion
    return (answer.reasoning or "").strip() in front


def _opens_thinking(prompt: str) -> bool:
    return prompt.rstrip().endswith("<think>")


def _join_thinking(
    prompt: str, whole: str, answer: Message, place: Place
) -> tuple[str, str | None]:
    """The completion where history lacks the thinking block that the generation prompt opens.

    The reasoning is closed as the template closes an empty one, if it writes that into history;
    else as Qwen's and DeepSeek's models do, on a line of its own with an empty line behind it.
    """
    match = _THINK_TAIL.search(prompt)
    assert match is not None, "the pattern matches the empty end"
    head, tail = prompt[: match.start()], match.group()
    rest = whole[len(head) :]
    closed = _EMPTY_THINKING.match(rest)
    if closed:
        rest = rest[closed.end() :]
    if not rest.startswith(answer.content):
        rest = rest.lstrip()
    is_answer = rest.lstrip().startswith(answer.content.strip())
    if not (tail and whole.startswith(head) and is_answer):
        raise RowRefused(
            "prompt_not_prefix",
            place,
            "the chat template writes the conversation so far differently once the answer is "
            "there, so prompt and answer cannot be told apart.",
            f"Prompt: {_excerpt(prompt, tail=True)}\n  Whole: {_excerpt(whole, tail=True)}",
        )
    if "</think>" not in tail:
        gap = closed[1] if closed else "\n\n"
        line = "\n" if gap == "\n\n" or tail.endswith("\n") else ""
        lead = "" if tail.endswith("\n") else line
        completion = f"{lead}{(answer.reasoning or '').strip()}{line}</think>{gap}{rest}"
        if answer.reasoning is None:
            return completion, (
                "the generation prompt opens <think>; answers without reasoning close it at once"
            )
        return completion, None
    if answer.reasoning is not None:
        raise RowRefused(
            "reasoning_dropped",
            place,
            "the row has reasoning, and the generation prompt closes the thinking before it.",
            f"Prompt: {_excerpt(prompt, tail=True)}",
        )
    return rest, None


def _since_question(messages: Sequence[Message]) -> Sequence[Message]:
    """The last user message and what follows it: calls and results of tools."""
    users = [at for at, message in enumerate(messages) if message.role == "user"]
    return messages[users[-1] :] if users else ()


def _is_written(text: str, rendered: str) -> bool:
    """Whether a template has written a text, as it is or as JSON."""
    text = text.strip()
    return text in rendered or _as_json(text)[1:-1] in rendered


def _check_calls(calls: Sequence[ToolCall], rendered: str, place: Place) -> None:
    """Refuse a row whose template does not write the calls of tools, in whatever notation."""
    for call in calls:
        for what in (call.name, *call.arguments):
            if not _is_written(what, rendered):
                raise RowRefused(
                    "call_dropped",
                    place,
                    f"the chat template leaves out the tool call {call.name}.",
                    "It knows no tool calls: set `template: FILE` to one that writes them. It "
                    f"makes of it {_excerpt(rendered, tail=True)}",
                )


def _stop_in(name: str, token: str, place: Place) -> RowRefused:
    return RowRefused(
        "stop_in_answer",
        place,
        f'the {name} contains the stop token "{token}", where it would be cut.',
        "Remove it from the text.",
    )


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system message, if any, and the turns: each a user message with what follows it."""
    head: list[Message] = []
    turns: list[list[Message]] = []
    for message in messages:
        if message.role == "user":
            turns.append([message])
        else:
            (turns[-1] if turns else head).append(message)
    return head, turns


def _control_pattern(tokenizer: Any, template: ChatTemplate) -> re.Pattern[str] | None:
    """Texts that the tokenizer reads as control tokens.

    Those are its special tokens and the added tokens that the template writes (`<think>` is often
    not marked special); added tokens that are mere words or white space are not.
    """
    source = template.source + (template.tool_source or "")
    return _any_of(
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content.strip() and (token.special or token.content in source)
    )


def _any_of(texts: Iterator[str]) -> re.Pattern[str] | None:
    # Longest first, as the tokenizer matches them.
    listed = sorted(set(texts), key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in listed)) if listed else None


def _mentions_tools(template: ChatTemplate) -> bool:
    return re.search(r"\btools\b", template.source + (template.tool_source or "")) is not None


def _excerpt(text: str, *, tail: bool = False, width: int = 160) -> str:
    if len(text) > width:
        text = "…" + text[-width:] if tail else text[:width] + "…"
    return json.dumps(text, ensure_ascii=False)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
