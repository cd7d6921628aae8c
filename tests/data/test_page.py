import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from chat_families import CHATML, make_tokenizer, talk

from myna.data.conversation import Place
from myna.data.dataset import Dataset, encode_dataset
from myna.data.encode import Encoder
from myna.data.faults import Fault
from myna.data.formats import Rows
from myna.data.page import page
from myna.data.statistics import count_everything
from myna.data.templates import choose_template
from myna.data.web_page import MAX_SHOWN

VOID = {"meta", "line", "br", "hr", "img", "link", "input"}


class Reader(HTMLParser):
    """Tags with their attributes, the text between them, and whether all are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def dataset(*pairs: tuple[str, str]) -> Dataset:
    tokenizer = make_tokenizer("byte", CHATML, eos_token="<|im_end|>")
    encoder = Encoder(
        tokenizer, choose_template(tokenizer, None), stop_ids=[tokenizer.eos_token_id]
    )
    conversations = [
        talk(("user", question), ("assistant", answer), line=line)
        for line, (question, answer) in enumerate(pairs, 1)
    ]
    return encode_dataset(encoder, Rows(tuple(conversations), ("rows.jsonl: a note",), "hash"))


def read(data: Dataset, *, shown: int = 20, title: str = "rows.jsonl", held_out: int = 0) -> Reader:
    counts = count_everything(data, held_out=held_out, seed=0, batch_size=4, max_length=64)
    reader = Reader()
    reader.feed(page(data, counts, range(min(shown, len(data.examples))), title=title))
    reader.close()
    assert reader.open == []
    return reader


def words(reader: Reader) -> str:
    return re.sub(r"\s+", " ", " ".join(reader.text))


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing() -> None:
    reader = read(dataset(("hello", "yes"), ("hello", "no")))
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    for _, attributes in reader.tags:
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    (policy,) = [a["content"] for _, a in reader.tags if "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_it_has_the_numbers_of_the_terminal() -> None:
    data = dataset(("hello", "yes"), ("hello", "no"), ("hello", "no"), ("what", "a bird"))
    text = words(read(data))
    assert "rows in 4" in text and "trained answers 4" in text and "duplicates 1" in text
    assert "in conflict 3 1 prompts have more than one answer" in text
    tokens, trained = data.accounting.tokens, data.accounting.trained_tokens
    assert f"tokens {tokens} trained {trained} {trained / tokens:.1%} of the tokens" in text
    assert "Lengths that keep all rows or 99 % of them" in text and "max_length is 64" in text
    assert "Shortest answers" in text and "a note" in text


def test_the_histogram_has_a_bar_for_each_span_of_lengths() -> None:
    data = dataset(*[("hello", "yes")] * 5, ("hello " * 20, "yes"))
    reader = read(data)
    bars = [attributes for tag, attributes in reader.tags if tag == "rect"]
    heights = [float(bar["height"] or "") for bar in bars]
    assert len(bars) == 10 and heights[1:9] == [0] * 8
    assert heights[9] * 5 == heights[0]
    assert sum(tag == "line" for tag, _ in reader.tags) == 3  # p50, p90, p99


def test_rows_are_spelt_out_with_trained_tokens_marked() -> None:
    data = dataset(("hello", "yes\nno"), ("what", "a bird"))
    reader = read(data, shown=1)
    articles = [tag for tag, _ in reader.tags if tag == "article"]
    assert len(articles) == 1
    text = "".join(reader.text)
    assert (
        "<|im_start|>user↵\nhello<|im_end|>↵\n<|im_start|>assistant↵\n⟦yes↵\nno<|im_end|>⟧" in text
    )
    trained = [
        a for tag, a in reader.tags if tag == "span" and "t" in (a.get("class") or "").split()
    ]
    # One span of the legend, then one per token; the answer's tokens are whole characters here.
    assert len(trained) == 1 + len(data.examples[0].completion_ids)


HOSTILE = '</pre></style><script>alert(1)</script><img src=x onerror="x">&amp;\x1b[2J\u202e\x00'


def test_hostile_text_is_only_text() -> None:
    data = dataset((HOSTILE, HOSTILE), ("hello", HOSTILE + " again"))
    data = replace(data, notes=(HOSTILE,))
    reader = read(data, title=HOSTILE)
    assert not {"script", "img"} & {tag for tag, _ in reader.tags}
    text = "".join(reader.text)
    made_visible = HOSTILE.replace("\x1b", "␛").replace("\u202e", "‹U+202E›").replace("\x00", "␀")
    # Title twice, note, two prompts' worth of tokens, and so on: always as written.
    assert text.count("<script>alert(1)</script>") >= 6
    assert made_visible in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", text)


def test_the_middle_of_a_very_long_text_is_left_out_and_counted() -> None:
    data = dataset(("hello " * 3000, "yes"))
    text = "".join(read(data).text)
    prompt = len(data.examples[0].prompt_text)
    assert f"[…{prompt - MAX_SHOWN:,} characters left out…]" in text
    assert len(text) < 2 * MAX_SHOWN + 6000


def test_refused_rows_stand_with_their_reasons() -> None:
    data = dataset(("hello", "yes"))
    assert "Refused rows" not in words(read(data))
    faults = [
        Fault("over_length", Place(Path("rows.jsonl"), line, line), f"{line} <b>tokens</b>.")
        for line in range(2, 27)
    ]
    refused = {"over_length": 2000}
    accounting = replace(data.accounting, rows_in=2001, refused=refused)
    data = replace(data, refusals=tuple(faults), accounting=accounting)
    text = words(read(data))
    assert "rows.jsonl line 2 2 <b>tokens</b>." in text and "rows.jsonl line 21 21" in text
    assert "rows.jsonl line 22" not in text and "And 1,980 more." in text


def test_held_out_rows_and_leaks_are_named() -> None:
    data = dataset(*[(f"hello {number}", "yes") for number in range(8)])
    text = words(read(data, held_out=2))
    assert "answers 8 6 trained, 2 held out" in text
    assert "leaked 2 held-out answers that training has seen" in text
