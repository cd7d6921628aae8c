import io
from typing import Any

from chat_families import CHATML, make_tokenizer, talk
from rich.console import Console, RenderableType

from myna.data.dataset import Accounting, Dataset, encode_dataset
from myna.data.encode import Encoder
from myna.data.formats import Rows
from myna.data.preview import (
    accounting_table,
    coloured_example,
    length_histogram,
    length_percentiles,
    preview,
    to_json,
)
from myna.data.store import Examples
from myna.data.templates import choose_template


def dataset(*, questions: list[str] | None = None) -> Dataset:
    tokenizer = make_tokenizer("byte", CHATML, eos_token="<|im_end|>")
    encoder = Encoder(
        tokenizer, choose_template(tokenizer, None), stop_ids=[tokenizer.eos_token_id]
    )
    conversations = [
        talk(("user", question), ("assistant", "yes\n[b]好")) for question in questions or ["hello"]
    ]
    return encode_dataset(encoder, Rows(tuple(conversations), ("rows.jsonl: one row",), "hash"))


def shown(renderable: RenderableType, **options: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100, **options).print(renderable)
    return stream.getvalue()


def with_lengths(*lengths: int) -> Dataset:
    base = dataset()
    example = base.examples[0]
    from dataclasses import replace

    examples = Examples.of(
        replace(example, prompt_ids=(1,) * (length - 2), completion_ids=(1, 2))
        for length in lengths
    )
    return replace(base, examples=examples)


def test_json_is_the_contract() -> None:
    data = dataset(questions=["hello", "hello", "what"])
    found = to_json(data, rows=2)
    assert list(found) == [
        "rows_in",
        "trained",
        "refused",
        "truncated",
        "tokens",
        "trained_tokens",
        "length",
        "rows",
    ]
    assert (found["rows_in"], found["trained"]) == (3, 3)
    assert (found["refused"], found["truncated"]) == ({}, {})
    assert found["tokens"] == sum(len(e.prompt_ids + e.completion_ids) for e in data.examples)
    assert len(found["rows"]) == 2
    row = found["rows"][0]
    assert list(row) == ["prompt_text", "completion_text", "prompt_ids", "completion_ids"]
    assert row["prompt_text"] == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert row["completion_text"] == "yes\n[b]好<|im_end|>"
    assert row["prompt_ids"] == list(data.examples[0].prompt_ids)
    assert "rows" not in to_json(data)


def test_percentiles_by_nearest_rank() -> None:
    assert length_percentiles(with_lengths(*range(1, 101)).examples) == {
        "p50": 50,
        "p90": 90,
        "p99": 99,
        "max": 100,
    }
    assert length_percentiles(with_lengths(7).examples) == {"p50": 7, "p90": 7, "p99": 7, "max": 7}


def test_histogram_counted_by_hand() -> None:
    text = shown(length_histogram(with_lengths(10, 10, 10, 10, 19, 20, 109)))
    lines = [line.split() for line in text.splitlines()]
    assert " ".join(lines[0]) == (
        "tokens per answer with its context: p50 10 p90 109 p99 109 max 109"
    )
    # Ten bars of width 10 from 10 to 109; the longest bar has 40 blocks.
    assert lines[1] == ["10-19", "█" * 40, "5"]
    assert lines[2] == ["20-29", "█" * 8, "1"]
    assert lines[3] == ["30-39", "0"]
    assert lines[10] == ["100-109", "█" * 8, "1"]
    assert len(lines) == 11


def test_one_row_among_thousands_is_seen() -> None:
    text = shown(length_histogram(with_lengths(*[10] * 5000, 90)))
    assert text.splitlines()[-1].split() == ["82-90", "▏", "1"]


def test_table_names_every_reason() -> None:
    from dataclasses import replace

    accounting = Accounting(10, 6, {"over_length": 3}, {"turns_dropped": 1}, 1000, 250)
    text = shown(accounting_table(replace(dataset(), accounting=accounting)))
    assert [line.split() for line in text.splitlines()] == [
        ["rows", "in", "10"],
        ["trained", "whole", "6"],
        ["truncated", "1", "oldest", "turns", "dropped", "to", "fit", "max_length"],
        ["refused", "3", "longer", "than", "max_length"],
        ["trained", "answers", "1"],
        ["tokens", "1,000"],
        ["trained", "250", "25.0%", "of", "the", "tokens"],
    ]


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


def test_long_texts_are_cut_in_their_middle() -> None:
    data = dataset(questions=["hello " * 2000])
    text = shown(coloured_example(data.examples[0], data.tokenizer)).replace("\n", "")
    assert "characters left out…]" in text
    assert text.endswith("⟦yes↵[b]好<|im_end|>⟧")
    assert len(text) < 2200


def test_preview_shows_notes_table_lengths_and_as_many_examples_as_asked() -> None:
    data = dataset(questions=["hello", "what"])
    text = shown(preview(data, examples=2))
    assert text.startswith("· rows.jsonl: one row\n· chat template: the tokenizer's own\n")
    assert text.index("rows in") < text.index("tokens per answer") < text.index("⟦so⟧")
    assert text.count("⟦so⟧") == 2
