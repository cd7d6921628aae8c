import io
from dataclasses import replace
from typing import Any

import pytest
from chat_families import CHATML, make_tokenizer, talk
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, RenderableType

from myna.data.dataset import Accounting, Dataset, encode_dataset
from myna.data.encode import Encoder
from myna.data.formats import Rows
from myna.data.lengths import Bar, RowLengths, length_bars, length_percentiles
from myna.data.preview import (
    accounting_table,
    choices_table,
    coloured_example,
    cut_pieces,
    length_histogram,
    odd_rows,
    overview,
    preview,
    row_remarks,
    statistics_table,
    visible,
)
from myna.data.statistics import Statistics, count_everything, find_repeats
from myna.data.templates import choose_template


def dataset(*, questions: list[str] | None = None, answers: list[str] | None = None) -> Dataset:
    tokenizer = make_tokenizer("byte", CHATML, eos_token="<|im_end|>")
    encoder = Encoder(
        tokenizer, choose_template(tokenizer, None), stop_ids=[tokenizer.eos_token_id]
    )
    questions = questions or ["hello"]
    answers = answers or ["yes\n[b]好"] * len(questions)
    conversations = [
        talk(("user", question), ("assistant", answer), line=line)
        for line, (question, answer) in enumerate(zip(questions, answers, strict=True), 1)
    ]
    return encode_dataset(encoder, Rows(tuple(conversations), ("rows.jsonl: one row",), "hash"))


def counted(data: Dataset, **options: Any) -> Statistics:
    settings = {"held_out": 0, "seed": 0, "batch_size": 16, "max_length": None, **options}
    return count_everything(data, **settings)


def shown(renderable: RenderableType, width: int = 100, **options: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, **options).print(renderable)
    return stream.getvalue()


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def histogram(*lengths: int) -> list[str]:
    bars, percentiles = length_bars(lengths), length_percentiles(lengths)
    return shown(length_histogram(percentiles, bars)).splitlines()


def test_histogram_counted_by_hand() -> None:
    lines = [line.split() for line in histogram(10, 10, 10, 10, 19, 20, 29)]
    assert " ".join(lines[0]) == ("tokens per answer with its context: p50 10 p90 29 p99 29 max 29")
    # Ten bars of width 2 from 10 to 29; the longest bar has 40 blocks.
    assert lines[1] == ["10-11", "█" * 40, "4"]
    assert lines[2] == ["12-13", "0"]
    assert lines[5] == ["18-19", "█" * 10, "1"]
    assert lines[6] == ["20-21", "█" * 10, "1"]
    assert lines[10] == ["28-29", "█" * 10, "1"]
    assert len(lines) == 11


def test_one_row_among_thousands_is_seen() -> None:
    assert histogram(*[10] * 5000, 29)[-1].split() == ["28-29", "▏", "1"]


def test_table_names_every_reason() -> None:
    accounting = Accounting(10, 6, {"over_length": 3}, {"turns_dropped": 1}, 1000, 250)
    assert words(shown(accounting_table(accounting, 7))) == [
        ["rows", "in", "10"],
        ["trained", "whole", "6"],
        ["truncated", "1", "oldest", "turns", "dropped", "to", "fit", "max_length"],
        ["refused", "3", "longer", "than", "max_length"],
        ["trained", "answers", "7"],
        ["tokens", "1,000"],
        ["trained", "250", "25.0%", "of", "the", "tokens"],
    ]


def test_statistics_stand_below_what_they_are_about() -> None:
    data = dataset(questions=["hello", "hello", "hello", "what"], answers=["a", "a", "b", "c"])
    counts = counted(data, batch_size=3)
    found = {
        line[: line.find("  ", 3)].strip(): line
        for line in shown(statistics_table(counts)).splitlines()
    }
    assert found["duplicates"].split()[1] == "1"
    assert found["in conflict"].split()[2:] == [
        "3",
        "1",
        "prompts",
        "have",
        "more",
        "than",
        "one",
        "answer",
    ]
    assert "2 steps of 3" in found["tokens of an epoch"]
    assert f"{counts.sharing.saved:.1%} saved" in found["computed"]
    assert "weights" not in found and "leaked" not in found


def test_lengths_and_what_they_cost() -> None:
    choices = RowLengths.of({50: 995, 1000: 5}, {50: 49750, 1000: 5000}).choices()
    text = shown(choices_table(choices, 384))
    assert "(max_length is 384)" in text
    lines = words(text)
    assert ["1,000", "1,000", "100.0%", "54,750", "100%"] in lines
    assert ["50", "995", "99.5%", "49,750", "91%"] in lines
    assert "attention" in text and "not counted" in text
    assert "(max_length is not limited)" in shown(choices_table(choices, None))


def test_example_is_legible_without_colour() -> None:
    data = dataset()
    text = shown(coloured_example(data.examples[0], data.tokenizer), no_color=True)
    assert text == (
        f"rows.jsonl line 1, answer 1: {len(data.examples[0].prompt_ids)} tokens of context, "
        f"{len(data.examples[0].completion_ids)} trained ⟦so⟧\n"
        "<|im_start|>user↵\nhello<|im_end|>↵\n<|im_start|>assistant↵\n⟦yes↵\n[b]好<|im_end|>⟧\n"
    )


def test_example_colours_trained_tokens_one_by_one() -> None:
    data = dataset()
    example = data.examples[0]
    text = coloured_example(example, data.tokenizer)
    styles = [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]
    context = [(piece, style) for piece, style in styles if style.startswith("dim")]
    trained = [(piece, style) for piece, style in styles if style.startswith("bold green")]
    assert context[0] == ("<|im_start|>", "dim") and context[1] == ("user", "dim underline")
    assert "".join(piece for piece, _ in trained) == "⟦yes↵\n[b]好<|im_end|>⟧"
    assert trained[-2][0] == "<|im_end|>"
    # The newline in front of an answer is the prompt's, whatever token would join both.
    assert "".join(piece for piece, _ in context).endswith("assistant↵\n")


def test_a_row_that_is_not_on_the_line_of_its_number_has_both() -> None:
    data = dataset()
    example = data.examples[0]
    moved = replace(example, place=replace(example.place, line=418, row=84))
    text = coloured_example(moved, data.tokenizer).plain
    assert text.startswith("rows.jsonl line 418 (row 84), answer 1: ")


def test_remarks_name_the_other_rows() -> None:
    data = dataset(questions=["hello"] * 3 + ["what"], answers=["a", "b", "a", "a"])
    remarks = [row_remarks(find_repeats(data.examples), data.examples, at) for at in range(4)]
    assert remarks[0] == ["another answer to this prompt: rows.jsonl line 2"]
    assert remarks[1] == ["another answer to this prompt: rows.jsonl line 1"]
    assert remarks[2][0] == "the same as rows.jsonl line 1"
    assert remarks[3] == []
    text = coloured_example(data.examples[2], data.tokenizer, remarks=remarks[2]).plain
    assert "trained ⟦so⟧ · the same as rows.jsonl line 1 · another answer" in text


def test_long_texts_are_cut_in_their_middle() -> None:
    data = dataset(questions=["hello " * 2000])
    text = shown(coloured_example(data.examples[0], data.tokenizer)).replace("\n", "")
    left_out = len(data.examples[0].prompt_text) - 1600
    assert f"[…{left_out:,} characters left out…]" in text
    assert text.endswith("⟦yes↵[b]好<|im_end|>⟧")
    assert len(text) < 2200
    whole = coloured_example(data.examples[0], data.tokenizer, whole=True).plain
    assert whole.count("hello") == 2000 and "left out" not in whole


@settings(deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=9), max_size=12), st.integers(2, 30))
def test_what_is_cut_and_what_is_left_are_the_whole(texts: list[str], limit: int) -> None:
    found = list(cut_pieces(texts, limit))
    whole = "".join(texts)
    shown_texts = [text for number, text in found if number is not None]
    if len(whole) <= limit:
        assert shown_texts == texts and len(found) == len(texts)
        return
    half = limit // 2
    marks = [index for index, (number, _) in enumerate(found) if number is None]
    assert len(marks) == 1
    front = "".join(text for _, text in found[: marks[0]])
    back = "".join(text for _, text in found[marks[0] + 1 :])
    assert (front, back) == (whole[:half], whole[len(whole) - half :])
    assert f"{len(whole) - 2 * half:,} characters" in found[marks[0]][1]
    for number, text in found:
        assert number is None or text in texts[number]


def test_what_a_terminal_would_obey_is_made_visible() -> None:
    hostile = "a\x1b[2J\x07\x00\x7f\x9b31m\u202eb\u2028c\ufeff\td"
    assert visible(hostile) == ("a␛[2J␇␀␡‹U+009B›31m‹U+202E›b‹U+2028›c‹U+FEFF›→d")
    data = dataset(questions=[hostile], answers=[hostile])
    text = shown(overview(replace(data, notes=(hostile,)), counted(data)))
    assert not set(text) & set("\x1b\x07\x00\x7f\x9b\u202e\u2028\ufeff\t")


def test_preview_is_a_screen_and_points_to_the_rest() -> None:
    data = dataset(questions=["hello", "what"])
    text = shown(preview(data), width=80)
    assert text.startswith("· rows.jsonl: one row\n· chat template: the tokenizer's own\n")
    assert text.index("rows in") < text.index("tokens per answer") < text.index("⟦so⟧")
    assert text.count("⟦so⟧") == 1
    assert text.splitlines()[-1].startswith("`myna data` shows")
    assert len(text.splitlines()) <= 32


def test_preview_tells_lengths_only_where_rows_were_too_long() -> None:
    data = dataset(questions=["hello", "what"])
    longest = int(data.row_lengths.lengths.max())
    assert "lengths that keep" not in shown(preview(data))
    assert "lengths that keep" not in shown(preview(data, max_length=longest))
    assert f"(max_length is {longest - 1})" in shown(preview(data, max_length=longest - 1))


def test_overview_shows_all_and_as_many_examples_as_asked() -> None:
    data = dataset(questions=["hello", "what"])
    text = shown(overview(data, counted(data), examples=2))
    order = [
        "one row",
        "rows in",
        "computed",
        "tokens per answer",
        "lengths that keep",
        "longest answer",
        "⟦so⟧",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert text.count("⟦so⟧") == 2


LONG_PLACE = "a-file-with-a-name-that-goes-on-and-on-and-on.jsonl line 1234567, answer 2"


@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_broken_at_80_columns(width: int) -> None:
    questions = [f"问题{number}？" * 30 + "a" * number for number in range(60)]
    answers = ["好的。" * 40 + "🙂" * (number % 3) for number in range(60)]
    data = dataset(questions=questions, answers=answers)
    counts = counted(data, held_out=9, max_length=100_000)
    long_places = [
        replace(oddity, rows=tuple(replace(row, place=LONG_PLACE) for row in oddity.rows))
        for oddity in counts.oddities
    ]
    for part in (
        statistics_table(counts),
        length_histogram(counts.length, counts.bars),
        choices_table(counts.choices, counts.max_length),
        odd_rows(counts.oddities),
        odd_rows(long_places),
    ):
        wide = shown(part, width=400).splitlines()
        narrow = shown(part, width=width).splitlines()
        # As many lines as there is room for all: none was wrapped, and none is too wide.
        assert len(narrow) == len(wide)
        assert all(cell_len(line) <= width for line in narrow)
    # Text gives way before the place and the measure do.
    text = shown(odd_rows(counts.oddities), width=width)
    for oddity in counts.oddities:
        for row in oddity.rows:
            assert f"  {row.place} " in text and f"  {row.measure} " in text


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=10))
def test_bars_of_any_size_fit(counts: list[int]) -> None:
    bars = [Bar(10**6 * at, 10**6 * (at + 1) - 1, count) for at, count in enumerate(counts)]
    percentiles = {"p50": 10**7, "p90": 10**7, "p99": 10**7, "max": 10**7}
    for line in shown(length_histogram(percentiles, bars), width=80).splitlines():
        assert cell_len(line) <= 80
