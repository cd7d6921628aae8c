"""Metrics against their own packages and against what a person counts."""

import sys
import tempfile
from pathlib import Path

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from myna.errors import ConfigError
from myna.evaluation.metrics import Judged, Metric, parse_metric, parse_metrics
from myna.evaluation.rows import after_thinking

ENGLISH = [
    ("the cat sat on the mat", "the cat sat on a mat"),
    ("There is a bird in the garden.", "There was a bird in our garden."),
    ("nothing alike", "A wholly different sentence."),
]
CHINESE = [("我喜欢上海大学。", "我喜欢北京大学。"), ("今天天气很好", "今天的天气非常好")]


def judged(answer: str, reference: str | None = None, place: str = "rows.jsonl line 1") -> Judged:
    return Judged(answer, reference, "Which?", True, place)


def worth(name: str, answer: str, reference: str | None = None) -> float:
    return parse_metric(name).judge(judged(answer, reference))


@pytest.mark.parametrize(
    ("name", "answer", "reference", "expected"),
    [
        ("exact_match", " Rome.\n", "Rome.", 1),
        ("exact_match", "rome.", "Rome.", 0),
        ("contains", "It is Rome, of course.", "Rome", 1),
        ("contains", "Rom", "Rome", 0),
        ("json", '{"city": "Rome", "age": [1, 2.5]}', None, 1),
        ("json", "{'city': 'Rome'}", None, 0),
        ("json", '{"a": NaN}', None, 0),
        ("json", '{"a": 1, "a": 2}', None, 0),
        ("json", "", None, 0),
        ("regex:^It is \\d+!$", "It is 7!", None, 1),
        ("regex:^It is \\d+!$", "It is seven!", None, 0),
        ("regex:皇上", "回皇上，是狗。", None, 1),
    ],
)
def test_single_answers(name: str, answer: str, reference: str | None, expected: float) -> None:
    assert worth(name, answer, reference) == expected


def test_many_answers_are_the_mean() -> None:
    metric = parse_metric("exact_match")
    assert metric.of_all([judged("a", "a"), judged("a", "b"), judged("c", "c")]) == 2 / 3


def test_only_what_stands_behind_the_reasoning_is_judged() -> None:
    assert after_thinking("<think>\nRome? No, Paris.\n</think>\n\nParis.") == "Paris."
    assert after_thinking("Paris. ") == "Paris."


def of_all(name: str, pairs: list[tuple[str, str]]) -> float:
    metric = parse_metric(name)
    assert metric.scale == 100
    return metric.of_all([judged(*pair) for pair in pairs])


def test_bleu_is_sacrebleus_with_the_tokenizer_of_the_language() -> None:
    for pairs, tokenizer in ((ENGLISH, "13a"), (CHINESE, "zh")):
        answers, references = zip(*pairs, strict=True)
        expected = sacrebleu.corpus_bleu(list(answers), [list(references)], tokenize=tokenizer)
        assert 10 < expected.score < 90
        assert of_all("bleu", pairs) == pytest.approx(expected.score, abs=1e-9)
        for answer, reference in pairs:
            alone = sacrebleu.sentence_bleu(answer, [reference], tokenize=tokenizer)
            assert worth("bleu", answer, reference) == pytest.approx(alone.score, abs=1e-9)
    # Chinese without its tokenizer is one word a sentence.
    assert of_all("bleu", CHINESE) > sacrebleu.corpus_bleu(*_lists(CHINESE)).score + 10
    mixed = of_all("bleu", [*ENGLISH, *CHINESE])
    assert min(of_all("bleu", ENGLISH), of_all("bleu", CHINESE)) < mixed < 90


def _lists(pairs: list[tuple[str, str]]) -> tuple[list[str], list[list[str]]]:
    return [answer for answer, _ in pairs], [[reference for _, reference in pairs]]


def test_chrf_is_sacrebleus() -> None:
    for pairs in (ENGLISH, CHINESE, [*ENGLISH, *CHINESE]):
        assert of_all("chrf", pairs) == pytest.approx(
            sacrebleu.corpus_chrf(*_lists(pairs)).score, abs=1e-9
        )
    answer, reference = CHINESE[0]
    expected = sacrebleu.sentence_chrf(answer, [reference]).score
    assert worth("chrf", answer, reference) == pytest.approx(expected, abs=1e-9)


def test_rouge_is_rouge_scores_and_cuts_chinese_into_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plain = RougeScorer(["rougeL"])
    for answer, reference in ENGLISH:
        expected = plain.score(reference, answer)["rougeL"].fmeasure
        assert worth("rouge", answer, reference) == pytest.approx(expected)
    # 我 喜欢 上海大学 against 我 喜欢 北京大学: two words of three.
    assert worth("rouge", *CHINESE[0]) == pytest.approx(2 / 3)
    assert plain.score(CHINESE[0][1], CHINESE[0][0])["rougeL"].fmeasure == 0
    assert list(tmp_path.iterdir()) == []  # jieba's cache would be unmarshalled by whoever is next


JUDGE = """
import math

def length(answer, reference, question):
    return len(answer) - len(reference) + len(question)

def polite(answer, reference, question):
    return "please" in answer

def broken(answer, reference, question):
    return 1 / (len(answer) - 3)

def wordy(answer, reference, question):
    return "yes"

def nothing(answer, reference, question):
    return math.nan

number = 5
"""


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    path = tmp_path / "judge.py"
    path.write_text(JUDGE)
    return path


def test_a_function_of_the_user_judges(judge: Path) -> None:
    metric = parse_metric(f"{judge}:length")
    assert metric.name == "judge.py:length" and not metric.needs_reference
    assert metric.judge(judged("abc", "b")) == 2 + len("Which?")
    assert worth(f"{judge}:polite", "please") == 1.0 and worth(f"{judge}:polite", "no") == 0.0


def refusal(text: str, answer: str = "abc") -> str:
    with pytest.raises(ConfigError) as refused:
        parse_metric(text).judge(judged(answer, "b", "rows.jsonl line 7"))
    return str(refused.value)


def test_what_a_function_does_wrong_is_told_with_file_row_and_exception(
    judge: Path, tmp_path: Path
) -> None:
    assert refusal(f"{judge}:broken") == (
        "metric judge.py:broken failed on rows.jsonl line 7: ZeroDivisionError: division by zero "
        "(judge.py line 11).\n"
        "  It was called with answer 'abc', reference 'b', question 'Which?'."
    )
    assert refusal(f"{judge}:wordy") == (
        "metric judge.py:wordy returned 'yes' for rows.jsonl line 7; expected a number, or True or "
        "False."
    )
    assert "metric judge.py:nothing returned nan for rows.jsonl" in refusal(f"{judge}:nothing")
    assert refusal(f"{judge}:number") == (
        f'metric {judge}:number: the file has no function "number"; it has length, polite, broken, '
        "wordy, nothing.\n"
        "  Expected: def NAME(answer, reference, question), which returns a number."
    )
    assert refusal("no.py:score") == "metric no.py:score: there is no such file."
    bad = tmp_path / "bad.py"
    bad.write_text("import nothing_of_that_name\n")
    assert refusal(f"{bad}:score") == (
        f"metric {bad}:score: the file cannot be run: ModuleNotFoundError: No module named "
        "'nothing_of_that_name' (bad.py line 1)."
    )
    bad.write_text("def score(:\n")
    assert "the file cannot be run: SyntaxError: " in refusal(f"{bad}:score")


def test_a_pattern_with_a_fault_is_shown_with_a_mark_below_it() -> None:
    assert refusal("regex:^(yes|no") == (
        "metric regex: missing ), unterminated subpattern at character 2:\n    ^(yes|no\n     ^"
    )
    assert refusal("regex:") == "metric regex: the pattern is empty; expected regex:PATTERN."


def test_names_that_are_none() -> None:
    assert refusal("exact-match") == (
        'metric "exact-match" is unknown; expected exact_match, contains, json, bleu, chrf, rouge, '
        'regex:PATTERN, FILE.py:FUNCTION.\n  Did you mean "exact_match"?'
    )
    with pytest.raises(ConfigError, match=r"^metric json is given twice; name it once"):
        parse_metrics(["json", "contains", "json"])


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("bleu", "sacrebleu.metrics", "sacrebleu"),
        ("chrf", "sacrebleu.metrics", "sacrebleu"),
        ("rouge", "rouge_score.rouge_scorer", "rouge-score"),
        ("rouge", "jieba", "jieba"),
    ],
)
def test_a_package_that_is_not_there(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert refusal(name) == (
        f"metric {name} needs {package}, which is not installed.\n  pip install 'myna[eval]'"
    )


def test_rows_without_an_answer_cannot_be_compared() -> None:
    rows = [("a.jsonl line 1", "yes"), ("a.jsonl line 2", None)]
    with pytest.raises(ConfigError) as refused:
        parse_metric("exact_match").check_rows(rows)
    assert str(refused.value) == (
        "metric exact_match compares with the row's own answer, and 1 of 2 rows have none (the "
        "first: a.jsonl line 2).\n"
        "  Add the answers, or judge by json, regex:PATTERN or FILE.py:FUNCTION."
    )
    assert isinstance(parse_metric("json"), Metric)
    parse_metric("json").check_rows(rows)
