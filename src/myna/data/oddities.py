"""Oddities: the few rows that deserve a look before anything is trained.

Owns what counts as odd, and why. Only what is seldom wanted counts: the longest and the shortest,
text that the vocabulary lacks, answers that go in circles, that say the question again, or that
stand under many questions. Style does not: an answer without a full stop, in capitals or in two
languages is nobody's mistake but the author's. Nothing here refuses a row.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from myna.data.conversation import Message
from myna.data.dataset import Dataset
from myna.data.rendering import TemplateError
from myna.data.store import Array, Example, Examples, mix
from myna.data.templates import ChatTemplate

SHOWN = 3
"""Rows named per oddity."""

MANY_UNKNOWN = 0.25
"""Share of tokens for characters the vocabulary lacks, from which on a row is odd …"""

USUALLY_KNOWN = 3
"""… if it is so many times the share in all rows: else the script is strange to the tokenizer."""

NGRAM = 4
"""Tokens that make a repetition if they stand in the same order again."""

REPETITIVE_FROM = 32
"""Tokens of an answer below which repetition is not looked for."""

REPETITIVE = 0.5
"""Share of an answer's n-grams that stood in it before, from which on it is odd."""

SAME_ANSWER_FROM = 10
"""Different prompts with one answer from which on that is told, if they are a hundredth of all."""

_WHITE_BYTES = {0x09, 0x0A, 0x0D, 0x20}
"""Bytes that sentencepiece vocabularies write as bytes although nothing is unknown about them."""

_BYTE = re.compile("<0x([0-9A-F]{2})>")

_PROBE = "myna probe of the question"


@dataclass(frozen=True, slots=True)
class OddRow:
    """One row of an oddity: the number of the example, and how much of it there is."""

    index: int
    measure: str
    place: str
    excerpt: str


@dataclass(frozen=True, slots=True)
class Oddity:
    """One reason to look, and the rows where it is greatest."""

    kind: str
    """A word for programs."""
    reason: str
    """For a person."""
    count: int
    """Answers it holds for."""
    rows: tuple[OddRow, ...]


def find_oddities(dataset: Dataset) -> tuple[Oddity, ...]:
    """The longest and shortest rows, then whatever else is odd, most telling first."""
    examples, tokenizer = dataset.examples, dataset.tokenizer
    if not len(examples):
        return ()
    found = [
        _longest(examples),
        _longest_answer(examples),
        _shortest_answer(examples),
        _unknown(examples, unknown_ids(tokenizer)),
        _repetitive(examples),
        _echo(examples, question_frames(dataset.template, _stop_texts(examples, tokenizer))),
        _same_answer(examples),
    ]
    return tuple(oddity for oddity in found if oddity is not None)


def unknown_ids(tokenizer: Any) -> NDArray[np.bool_]:
    """(V,) whether an id stands for text that the vocabulary lacks.

    Those are the unknown token, single bytes (`<0xE4>`), and in byte-level vocabularies tokens that
    are no whole characters. White space is often written in bytes and does not count.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    mask = np.zeros(max(vocabulary.values()) + 1, np.bool_)
    # GPT-2's unknown token is the one that ends a text, which says nothing about unknown ones.
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id not in ends:
        mask[tokenizer.unk_token_id] = True
    alphabet = _byte_alphabet()
    is_byte_level = all(character in vocabulary for character in alphabet)
    for token, index in vocabulary.items():
        if byte := _BYTE.fullmatch(token):
            mask[index] = int(byte[1], 16) not in _WHITE_BYTES
        elif is_byte_level and not token.isascii() and not _is_text(token, alphabet):
            mask[index] = True
    return mask


def question_frames(template: ChatTemplate, stop_texts: list[str]) -> list[tuple[str, str, str]]:
    """(text before a question, text from there to the answer, text that ends it), as rendered.

    Found by rendering a known question at the start and after an answer; empty where the template
    has nothing that marks where a question begins.
    """
    frames = []
    for thinking in (False, True):
        renderer = template.with_thinking(thinking)
        try:
            first = renderer.render([Message("user", _PROBE)], add_generation_prompt=True)
            later = renderer.render(
                [Message("user", "a"), Message("assistant", "b"), Message("user", _PROBE)],
                add_generation_prompt=True,
            )
        except TemplateError:
            continue
        if first.count(_PROBE) != 1 or later.count(_PROBE) != 1:
            continue
        before, _, tail = first.partition(_PROBE)
        header = _common_end(before, later.partition(_PROBE)[0])
        frames += [(header, tail, stop) for stop in stop_texts if header.strip()]
    return list(dict.fromkeys(frames))


def repeated_share(ids: Array, lengths: Array) -> NDArray[np.float64]:
    """(N,) share of the n-grams of each run of ids that stood earlier in the same run.

    Args:
        ids: the runs, one after the other.
        lengths: (N,) ids of each run, fewer than 2^24 of them.
    """
    total = len(ids) - NGRAM + 1
    shares = np.zeros(len(lengths))
    if total < 1:
        return shares
    run = np.repeat(np.arange(len(lengths), dtype=np.uint64), lengths)
    wide = ids.astype(np.uint64)
    key = np.zeros(total, np.uint64)
    for shift in range(NGRAM):
        key = (key + wide[shift : shift + total]) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    inside = run[:total] == run[NGRAM - 1 :]
    # Sorted, the n-grams of a run stand together, and equal ones side by side. 40 bits of hash
    # take two different n-grams of a run of a thousand for equal once in two million runs.
    key = np.sort((run[:total] << np.uint64(40) | key >> np.uint64(24))[inside])
    again = key[1:][key[1:] == key[:-1]] >> np.uint64(40)
    repeated = np.bincount(again.astype(np.int64), minlength=len(lengths))
    ngrams = np.maximum(np.asarray(lengths, np.int64) - NGRAM + 1, 1)
    return repeated / ngrams


def _longest(examples: Examples) -> Oddity:
    lengths = examples.lengths
    rows = [
        _row(examples, index, f"{lengths[index]:,} tokens", lambda row: row.prompt_text)
        for index in _greatest(lengths)
    ]
    return Oddity("longest", "longest, answer and context", len(rows), tuple(rows))


def _longest_answer(examples: Examples) -> Oddity:
    lengths = examples.completion_lengths
    rows = [
        _row(examples, index, f"{lengths[index]:,} tokens", _answer)
        for index in _greatest(lengths, 1)
    ]
    return Oddity("longest_answer", "longest answer", len(rows), tuple(rows))


def _shortest_answer(examples: Examples) -> Oddity:
    lengths = examples.completion_lengths
    shortest = lengths.min()
    rows = [
        _row(examples, index, f"{lengths[index]:,} tokens", _answer)
        for index in _greatest(-lengths)
    ]
    count = int((lengths == shortest).sum())
    return Oddity(
        "shortest_answer", "shortest answers, the stop token included", count, tuple(rows)
    )


def _unknown(examples: Examples, mask: NDArray[np.bool_]) -> Oddity | None:
    counts = np.empty(len(examples), np.int64)
    mask = np.append(mask, False)  # for ids beyond the vocabulary: they are no unknown text
    for first, last, ids in examples.id_blocks():
        unknown = mask[np.minimum(ids.astype(np.int64), len(mask) - 1)]
        counts[first:last] = np.add.reduceat(
            unknown, _starts(examples.lengths[first:last]), dtype=np.int64
        )
    lengths = examples.lengths
    share = counts / lengths
    usual = counts.sum() / lengths.sum(dtype=np.int64)
    is_odd = (share >= MANY_UNKNOWN) & (share >= USUALLY_KNOWN * usual)
    if not is_odd.any():
        return None
    rows = [
        _row(
            examples,
            index,
            f"{share[index]:.0%} of the tokens",
            lambda row: row.prompt_text + row.completion_text,
        )
        for index in _greatest(np.where(is_odd, share, 0), min(SHOWN, int(is_odd.sum())))
    ]
    reason = "characters the tokenizer lacks (unknown tokens or single bytes)"
    return Oddity("unknown_characters", reason, int(is_odd.sum()), tuple(rows))


def _repetitive(examples: Examples) -> Oddity | None:
    share = np.zeros(len(examples))
    numbers = np.flatnonzero(examples.completion_lengths >= REPETITIVE_FROM)
    long = examples.select(numbers)
    for first, last, ids in long.id_blocks():
        prompts = long.prompt_lengths[first:last]
        completions = long.completion_lengths[first:last]
        is_answer = np.repeat(
            np.tile([False, True], last - first), np.column_stack([prompts, completions]).ravel()
        )
        share[numbers[first:last]] = repeated_share(ids[is_answer], completions)
    is_odd = share >= REPETITIVE
    if not is_odd.any():
        return None
    rows = [
        _row(examples, index, f"{share[index]:.0%} said before", _answer)
        for index in _greatest(share, min(SHOWN, int(is_odd.sum())))
    ]
    return Oddity("repetitive", "answers that go in circles", int(is_odd.sum()), tuple(rows))


def _echo(examples: Examples, frames: list[tuple[str, str, str]]) -> Oddity | None:
    if not frames:
        return None
    found = [
        index
        for index, (prompt, completion) in enumerate(examples.texts())
        if _says_question_again(prompt, completion, frames)
    ]
    if not found:
        return None
    rows = tuple(_row(examples, index, "", _answer) for index in found[:SHOWN])
    return Oddity("echo", "the answer is the question again", len(found), rows)


def _same_answer(examples: Examples) -> Oddity | None:
    """The answer that stands under most different prompts, if these are many."""
    completions = examples.completion_hashes
    _, distinct = np.unique(mix(examples.prompt_hashes) ^ completions, return_index=True)
    answers, counts = np.unique(completions[distinct], return_counts=True)
    most = int(counts.argmax())
    times = int(counts[most])
    if times < max(SAME_ANSWER_FROM, len(examples) / 100):
        return None
    index = int(np.flatnonzero(completions == answers[most])[0])
    row = _row(examples, index, f"under {times:,} different prompts", _answer)
    return Oddity("same_answer", "one answer under many prompts", times, (row,))


def _row(examples: Examples, index: int, measure: str, text: Callable[[Example], str]) -> OddRow:
    example = examples[index]
    where = str(example.place) + (f", answer {example.turn}" if example.turn > 1 else "")
    return OddRow(index, measure, where, _excerpt(text(example)))


def _answer(example: Example) -> str:
    return example.completion_text


def _excerpt(text: str, width: int = 160) -> str:
    text = " ".join(text[: 4 * width].split())
    return text if len(text) <= width else text[:width] + "…"


def _greatest(values: Array, count: int = SHOWN) -> list[int]:
    """Numbers of the greatest values, greatest first, of equal ones the earlier."""
    count = min(count, len(values))
    threshold = np.partition(values, -count)[-count]
    near = np.flatnonzero(values >= threshold)
    ordered = near[np.argsort(-values[near], kind="stable")]
    return [int(index) for index in ordered[:count]]


def _starts(lengths: Array) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)])


def _says_question_again(prompt: str, completion: str, frames: list[tuple[str, str, str]]) -> bool:
    for header, tail, stop in frames:
        answer = completion.removesuffix(stop).strip()
        if not answer or not prompt.endswith(tail):
            continue
        asked = prompt[: len(prompt) - len(tail)].rstrip()
        if asked.endswith(answer):
            before = asked[: len(asked) - len(answer)].rstrip()
            if before.endswith(header.rstrip()):
                return True
    return False


def _stop_texts(examples: Examples, tokenizer: Any) -> list[str]:
    """What the answers end in, as text."""
    found: set[int] = set()
    for first, last, ids in examples.id_blocks():
        ends = np.cumsum(examples.lengths[first:last], dtype=np.int64)
        found.update(np.unique(ids[ends - 1]).tolist())
    return [
        tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for index in sorted(found)
    ]


def _common_end(one: str, other: str) -> str:
    size = 0
    while size < min(len(one), len(other)) and one[-size - 1] == other[-size - 1]:
        size += 1
    return one[len(one) - size :]


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes as (Radford et al. 2019, GPT-2).

    Printable ones stand for themselves, the others for those from 256 on, in their order.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


def _is_text(token: str, alphabet: dict[str, int]) -> bool:
    """Whether a token of a byte-level vocabulary is whole characters."""
    try:
        bytes(alphabet[character] for character in token).decode()
    except KeyError:
        return True  # an added token, which is written as it is
    except UnicodeDecodeError:
        return False
    return True
