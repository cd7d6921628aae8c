"""A conversation of several turns with a `Speaker`.

Owns the history: what is sent again with each question, what an interrupted answer leaves behind,
and which turns go when the context is full. Prompts are the encoder's, so that they are the ones
trained on; generation is `generate.py`'s, the terminal `cli.chat`'s.
"""

import re
from collections.abc import Callable, Generator
from dataclasses import replace

from myna.data.conversation import Message
from myna.data.encode import Prompt
from myna.inference.generate import Answer, Sampling
from myna.inference.speaker import Speaker

_THOUGHT = re.compile(r"\s*(?:<think>)?(?P<reasoning>.*?)</think>(?P<content>.*)", re.DOTALL)


class ChatSession:
    """Turns of one conversation. `note` is told, in a sentence, what happened to the history."""

    def __init__(
        self, speaker: Speaker, sampling: Sampling, *, note: Callable[[str], None]
    ) -> None:
        self.speaker = speaker
        self.sampling = sampling
        self._note = note
        self._turns: list[tuple[Message, Message]] = []
        self._asked = 0

    @property
    def messages(self) -> list[Message]:
        """What has been said and is still remembered, without the persona."""
        return [message for turn in self._turns for message in turn]

    def clear(self) -> None:
        """Forget everything that was said."""
        self._turns.clear()

    def ask(self, text: str) -> Generator[str, None, Answer]:
        """Yield the answer to `text` piece by piece; the generator returns the whole `Answer`.

        Both become part of the history once something was said, even if the answer is then
        interrupted (close the generator). Raises DataError, the history as it was, for a text that
        spells a control token or is longer than the context.
        """
        question = Message("user", text)
        prompt = self._prompt(question)
        sampling = self.sampling
        if sampling.seed is not None:
            # One seed for all answers would draw the same numbers in each.
            sampling = replace(sampling, seed=sampling.seed + self._asked)
        self._asked += 1
        stream = self.speaker.stream(prompt.ids, sampling)
        pieces: list[str] = []
        try:
            while True:
                try:
                    piece = next(stream)
                except StopIteration as end:
                    answer: Answer = end.value
                    return answer
                pieces.append(piece)
                yield piece
        finally:
            stream.close()
            if pieces:
                self._turns.append((question, as_message("".join(pieces))))

    def _prompt(self, question: Message) -> Prompt:
        """The prompt for `question`, with as many of the latest turns as the context has room for.

        A quarter of the context is kept for the answer, or less if it may not be so long.
        """
        # Only what was typed can smuggle control tokens in: the model's own are sent back as such.
        self.speaker.encoder.prompt([question])
        encoder = self.speaker.history_encoder
        context = self.speaker.context
        dropped = 0
        while True:
            prompt = encoder.prompt([*self.messages, question])
            if context is None or not self._turns:
                break
            if len(prompt.ids) + min(self.sampling.max_new_tokens, context // 4) <= context:
                break
            del self._turns[0]
            dropped += 1
        if dropped:
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            self._note(f"the context of {context:,} tokens is full: the oldest {turns} forgotten")
        self.speaker.check_fits(prompt.ids)
        return prompt


def as_message(text: str) -> Message:
    """An answer as the template takes it back: thinking apart from what was said."""
    if found := _THOUGHT.fullmatch(text):
        return Message(
            "assistant", found["content"].strip(), reasoning=found["reasoning"].strip() or None
        )
    return Message("assistant", text)
