"""The pipeline: the same examples and account as row by row, on every way through it."""

import json
import os
import random
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_families import CHATML, QWEN3, STATES, make_tokenizer
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from myna.data import json_rows, pipeline
from myna.data.cache import Entry
from myna.data.dataset import Dataset, encode_dataset
from myna.data.encode import Encoder
from myna.data.formats import read_conversations
from myna.data.pipeline import described, encode_files
from myna.data.sources import Source
from myna.data.templates import choose_template
from myna.errors import DataError

Write = Callable[[str, str | bytes], Path]
WORDS = ["what", "is", "the", "capital", "of", "France", "hello", "there\n", "", "two", "answer"]
WORDS += ["你好", "今天", "天气", "😀", "："]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MYNA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of more than a hundred rows go through the cache."""
    monkeypatch.setattr(pipeline, "FEW_CHUNKS", 1)
    monkeypatch.setattr(json_rows, "CHUNK_ROWS", 100)


def text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 12))).strip() or "x"


def alpaca(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in the alpaca format, of which some repeat and some have a system text of their own."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for at in range(number):
        row = {"instruction": text(draw), "input": draw.choice(["", text(draw)]), "output": "yes"}
        row["output"] = text(draw)
        if at % 7 == 0:
            row["system"] = "You are a bird."
        if at % 11 == 0:
            row["history"] = [[text(draw), text(draw)]]
        if at % 5 == 0:
            row["id"] = str(at)
        rows.append(rows[-1] if at % 13 == 12 else row)
    return rows


def lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def encoder(tokenizer: Any = None, **options: Any) -> Encoder:
    tokenizer = tokenizer or make_tokenizer("byte", CHATML, eos_token="<|im_end|>")
    options = {"stop_ids": [tokenizer.eos_token_id], "system": "Be brief.", **options}
    return Encoder(tokenizer, choose_template(tokenizer, None), **options)


def run(made: Encoder, *paths: Path, num_workers: int = 1, **options: Any) -> Dataset:
    return encode_files(
        made,
        [Source(path) for path in paths],
        tokenizer_hash="t",
        num_workers=num_workers,
        **options,
    )


def row_by_row(made: Encoder, *paths: Path) -> Dataset:
    return encode_dataset(made, read_conversations(paths))


def assert_same(one: Dataset, other: Dataset) -> None:
    assert list(one.examples) == list(other.examples)
    assert one.accounting == other.accounting
    assert one.notes == other.notes
    assert one.content_hash == other.content_hash
    assert one.template == other.template
    assert one.refusals == other.refusals
    assert one.row_lengths.choices() == other.row_lengths.choices()


def fail(*_: object, **__: object) -> None:
    raise AssertionError("nothing is to be encoded")


def test_small_files_are_as_row_by_row_and_leave_no_trace(write: Write, folder: Path) -> None:
    paths = [write("a.jsonl", lines(alpaca(150))), write("b.json", json.dumps(alpaca(40, seed=1)))]
    assert_same(run(encoder(), *paths), row_by_row(encoder(), *paths))
    assert not folder.exists()


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("over_length", ["drop", "truncate_prompt"])
def test_large_files_are_as_row_by_row_and_the_second_time_too(
    write: Write, monkeypatch: pytest.MonkeyPatch, num_workers: int, over_length: str
) -> None:
    paths = [
        write("a.jsonl", lines(alpaca(150))),
        write("b.json", json.dumps(alpaca(120, seed=1))),
        write("c.jsonl", lines([{"inputs": "[|Human|]:q[|AI|]:", "targets": "a"}] * 30)),
    ]
    options = {"max_length": 90, "over_length": over_length}
    expected = row_by_row(encoder(**options), *paths)
    assert expected.accounting.rows_in == 300
    shortened, dropped = expected.accounting.truncated, expected.accounting.refused
    assert dropped if over_length == "drop" else shortened
    assert any("b.json" in note for note in expected.notes)
    assert_same(run(encoder(**options), *paths, num_workers=num_workers), expected)
    monkeypatch.setattr(pipeline, "EncodeChunk", fail)
    monkeypatch.setattr(pipeline, "look_at", fail)
    assert_same(run(encoder(**options), *paths), expected)


@pytest.mark.usefixtures("large")
def test_reasoning_sets_the_thinking_switch_also_from_the_cache(write: Write) -> None:
    tokenizer = make_tokenizer("byte", QWEN3, eos_token="<|im_end|>", added=["<think>", "</think>"])
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": messages}] * 210
    thinker = {**messages[1], "reasoning_content": "because"}
    rows[205] = {"messages": [messages[0], thinker]}
    path = write("a.jsonl", lines(rows))
    expected = row_by_row(encoder(tokenizer), path)
    assert expected.template.options == {"enable_thinking": True}
    for _ in range(2):
        assert_same(run(encoder(tokenizer), path), expected)


@pytest.mark.usefixtures("large")
def test_a_killed_run_is_gone_on_with(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", 0.0)
    path = write("a.jsonl", lines(alpaca(550)))
    expected = row_by_row(encoder(), path)

    class Killed(BaseException):
        pass

    def kill(rows: int) -> None:
        if rows > 300:
            raise Killed

    with pytest.raises(Killed):
        run(encoder(), path, on_rows=kill)
    done: list[int] = []
    assert_same(run(encoder(), path, num_workers=2, on_rows=done.append), expected)
    assert done == [400, 500, 550]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_one_bad_row_is_found_and_named(write: Write, num_workers: int) -> None:
    rows = alpaca(420)
    rows[345] = {**rows[345], "output": "  "}
    with pytest.raises(DataError) as error:
        run(encoder(), write("a.jsonl", lines(rows)), num_workers=num_workers)
    assert str(error.value) == (
        "a.jsonl line 346: output is empty; expected a text.\n"
        "  Fill it in or delete the row: an empty answer would train the model to say nothing. "
        "Training has not started."
    )


@pytest.mark.full
def test_one_bad_row_among_a_million_is_found_and_named(write: Write) -> None:
    """P20. Rows are short, so that this is about their number."""
    good = '{"instruction":"q","output":"a"}\n'
    content = good * 765_432 + '{"instruction":"q","output":3}\n' + good * 234_567
    with pytest.raises(DataError, match=r"^a.jsonl line 765433: output is the number 3; expected"):
        run(encoder(), write("a.jsonl", content), num_workers=2)


@pytest.mark.usefixtures("large")
def test_faults_of_all_kinds_and_files_come_in_one_error(write: Write) -> None:
    rows: list[Any] = alpaca(250)
    rows[110] = {**rows[110], "instruction": 5, "input": ""}
    rows[210] = {**rows[210], "output": "<|im_end|>"}
    first = write("a.jsonl", lines(rows[:200]) + "{broken\n" + lines(rows[200:]))
    second = write("b.jsonl", lines([{"instruction": "q", "output": None}] * 30))
    with pytest.raises(DataError) as error:
        run(encoder(), first, second, num_workers=2)
    message = str(error.value)
    for expected in (
        "a.jsonl line 111: instruction is the number 5; expected a text.",
        "a.jsonl line 201, column 2: broken JSON",
        'a.jsonl line 212: the assistant text of turn 1 contains "<|im_end|>"',
        "b.jsonl line 1: output is null; expected a text.",
        "30 rows have this fault: lines 1, 2, 3, 4, 5",
    ):
        assert expected in message


@pytest.mark.usefixtures("large")
def test_a_file_that_changes_meanwhile_is_refused(write: Write) -> None:
    path = write("a.jsonl", lines(alpaca(210)))

    def change(rows: int) -> None:
        path.write_text(lines(alpaca(210, seed=5)), encoding="utf-8")

    with pytest.raises(DataError, match=r"a\.jsonl was changed while it was read\.\n  Repeat"):
        run(encoder(), path, on_rows=change)
    assert_same(run(encoder(), path), row_by_row(encoder(), path))


class Odd(PreTrainedTokenizerFast):  # type: ignore[misc]
    """Does something to whole texts that its engine does not know."""

    def __call__(self, texts: Any, **options: Any) -> Any:
        if not isinstance(texts, str):
            texts = [each.replace("odd", "even") for each in texts]
        return super().__call__(texts, **options)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("few", [1, 8])
@pytest.mark.parametrize("at", [3, 207])
def test_where_pieces_differ_everything_is_encoded_whole(
    write: Write, monkeypatch: pytest.MonkeyPatch, few: int, at: int
) -> None:
    monkeypatch.setattr(pipeline, "FEW_CHUNKS", few)
    monkeypatch.setattr("myna.data.segments.CHECKED_EVERY", 1)
    tokenizer = Odd(tokenizer_object=Tokenizer.from_str(STATES["byte"]), eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    rows = alpaca(250)
    rows[at] = {"instruction": "an odd question", "output": "odd"}
    path = write("a.jsonl", lines(rows))
    found = run(encoder(tokenizer), path)
    assert_same(found, row_by_row(encoder(tokenizer), path))
    even = tokenizer.backend_tokenizer.encode("even", add_special_tokens=False).ids
    (example,) = (each for each in found.examples if each.place.row == at + 1)
    assert list(example.completion_ids[: len(even)]) == even


@pytest.mark.usefixtures("large")
def test_a_tokenizer_that_cannot_be_handed_over_is_used_here(write: Write) -> None:
    tokenizer = Odd(tokenizer_object=Tokenizer.from_str(STATES["byte"]), eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.lock = threading.Lock()  # nothing that can be pickled
    path = write("a.jsonl", lines(alpaca(210)))
    found = run(encoder(tokenizer), path, num_workers=2)
    expected = row_by_row(encoder(tokenizer), path)
    assert list(found.examples) == list(expected.examples)
    assert found.notes[:-1] == expected.notes
    assert found.notes[-1].startswith("rows were encoded by one process: TypeError: cannot pickle")


def keys_of(write: Write, **changes: Any) -> str:
    tokenizer = make_tokenizer("byte", changes.pop("template", CHATML), eos_token="<|im_end|>")
    made = encoder(tokenizer, **changes.pop("encoder", {}))
    path = write(changes.pop("name", "a.jsonl"), changes.pop("content", "content"))
    digests = [pipeline.content_sha256(path)]
    return pipeline._key(made, [Source(path)], digests, changes.pop("tokenizer_hash", "t"), "stop")


def test_the_key_changes_with_all_that_decides_ids(write: Write) -> None:
    base = keys_of(write)
    assert keys_of(write) == base
    others = [
        keys_of(write, **changes)
        for changes in (
            {"content": "Content"},
            {"name": "b.jsonl"},
            {"tokenizer_hash": "u"},
            {"template": CHATML + " "},
            {"encoder": {"system": "Be loud."}},
            {"encoder": {"max_length": 5}},
            {"encoder": {"over_length": "drop"}},
            {"encoder": {"control_tokens": "allow"}},
            {"encoder": {"stop_ids": [1]}},
        )
    ]
    assert len({base, *others}) == 1 + len(others)


def test_a_template_that_writes_the_date_is_encoded_anew_each_day(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = "{{ strftime_now('%d') }}" + CHATML
    first = keys_of(write, template=dated)

    class Later(pipeline.datetime.date):  # type: ignore[name-defined,misc]
        @classmethod
        def today(cls) -> Any:
            return cls(2030, 1, 1)

    monkeypatch.setattr(pipeline.datetime, "date", Later)
    assert keys_of(write, template=dated) != first
    monkeypatch.undo()


def test_a_change_that_keeps_size_and_time_is_noticed(write: Write, large: None) -> None:
    """P21: identity is the content's."""
    path = write("a.jsonl", lines(alpaca(210)))
    first = run(encoder(), path)
    stat = path.stat()
    content = path.read_bytes()
    changed = content.replace(b"France", b"Greece", 1)
    assert len(changed) == len(content) and changed != content
    path.write_bytes(changed)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = run(encoder(), path)
    assert second.content_hash != first.content_hash
    assert_same(second, row_by_row(encoder(), path))


def test_the_weights_of_sources_come_with_the_examples(write: Write, large: None) -> None:
    paths = [write("a.jsonl", lines(alpaca(110))), write("b.jsonl", lines(alpaca(20, seed=3)))]
    sources = [Source(paths[0], 0.5), Source(paths[1], 2.0)]
    for _ in range(2):
        found = encode_files(encoder(), sources, tokenizer_hash="t", num_workers=1)
        assert found.examples.file_weights == (0.5, 2.0)
        assert found.examples.files == tuple(paths)
        for example, number in zip(found.examples, found.examples.file_indices, strict=True):
            assert example.place.file == paths[number]
        assert set(found.examples.file_indices.tolist()) == {0, 1}


def test_a_row_that_is_lost_on_the_way_stops_everything(write: Write, large: None) -> None:
    """P22: what came in and what came out is compared for every chunk."""
    job = pipeline.EncodeChunk(encoder())
    path = write("a.jsonl", lines(alpaca(150)))
    source = Source(path)
    tasks = list(pipeline._tasks([source], [pipeline._form_of(source)]))
    first, second = map(job, tasks)
    account = pipeline._Account(1)
    with pytest.raises(AssertionError, match="row 101 came after row 0"):
        account.add(second)
    account.add(first)
    with pytest.raises(AssertionError, match="row 1 came after row 100"):
        account.add(first)
    with pytest.raises(AssertionError, match="51 rows came in, 50 and 0 faults came out"):
        account.add(replace(second, rows=51))
    account.add(second)
    assert account.rows == 150


def test_an_empty_list_among_the_files_is_said_before_anything_is_encoded(write: Write) -> None:
    with pytest.raises(DataError, match=r"b\.json holds no rows; expected"):
        run(encoder(), write("a.jsonl", lines(alpaca(3))), write("b.json", "[]"))


def test_settings_without_a_fixed_description_are_not_guessed() -> None:
    with pytest.raises(TypeError, match="object has no fixed description"):
        described({"a": [object()]})
    assert described({"b": (1, {2}), "a": AddedToken("x")}) == described(
        {"a": AddedToken("x"), "b": [1, {2}]}
    )


def test_an_entry_that_another_process_made_meanwhile_is_taken(
    write: Write, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a.jsonl", lines(alpaca(210)))
    expected = row_by_row(encoder(), path)
    locked = Entry.locked

    def slow(self: Entry) -> Any:
        monkeypatch.setattr(Entry, "locked", locked)
        run(encoder(), path)  # the other one had the lock
        monkeypatch.setattr(pipeline._Work, "_fill", fail)
        return locked(self)

    monkeypatch.setattr(Entry, "locked", slow)
    assert_same(run(encoder(), path), expected)


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_memory_does_not_grow_with_the_rows(write: Write) -> None:
    """What belongs to this process and its workers, after a fifth of the rows and at the end."""
    content = lines(alpaca(4000)) * 50
    held: dict[int, int] = {}

    def look(rows: int) -> None:
        if rows % 10_000 == 0:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            held[rows] = sum(map(anonymous_bytes, ("self", *children)))

    run(encoder(), write("a.jsonl", content), num_workers=2, on_rows=look)
    late = [found for rows, found in held.items() if rows > 100_000]
    early = [found for rows, found in held.items() if 20_000 <= rows <= 60_000]
    assert max(late) - max(early) < 40e6  # 140,000 rows more: 285 bytes for each would show


def anonymous_bytes(process: str) -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found.group(1)) * 1024 if found else 0
