"""Metrics: what an answer is worth, by a name that a user writes.

Owns the names (`exact_match`, `regex:PATTERN`, `judge.py:score` …), how each judges one answer and
many, and the errors of a pattern or a function that is not in order. Higher is better in all of
them. Answers come from elsewhere; nothing here loads a model.
"""

import difflib
import importlib.util
import math
import re
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from myna.data.json_text import NotJson, parse_json_text
from myna.errors import ConfigError

EXTRA = "  pip install 'myna[eval]'"

_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True, slots=True)
class Judged:
    """An answer that is judged."""

    answer: str
    reference: str | None
    """The row's own answer; None where it has none."""
    question: str
    """What the user said last."""
    stopped: bool
    """Whether the model ended its answer; else it was cut."""
    place: str
    """Where the row stands, for errors."""


@dataclass(frozen=True)
class Metric:
    """One way to judge."""

    name: str
    """As tables and files call it."""
    judge: Callable[[Judged], float]
    """The worth of one answer, from 0 to `scale`; a user's function may give any number."""
    scale: Literal[1, 100] = 1
    needs_reference: bool = False
    judge_all: Callable[[Sequence[Judged]], float] | None = None
    """The worth of all answers together, where that is not the mean."""

    def of_all(self, answers: Sequence[Judged]) -> float:
        """The worth of `answers`, at least one."""
        if self.judge_all is not None:
            return self.judge_all(answers)
        return sum(map(self.judge, answers)) / len(answers)

    def check_rows(self, references: Sequence[tuple[str, str | None]]) -> None:
        """Raise ConfigError where the metric compares and a row has nothing to compare with.

        Args:
            references: place and own answer of every row.
        """
        without = [place for place, reference in references if reference is None]
        if self.needs_reference and without:
            raise ConfigError(
                f"metric {self.name} compares with the row's own answer, and {len(without):,} of "
                f"{len(references):,} rows have none (the first: {without[0]}).\n"
                "  Add the answers, or judge by json, regex:PATTERN or FILE.py:FUNCTION."
            )


def parse_metric(text: str) -> Metric:
    """The metric that `text` names.

    Raises ConfigError for an unknown name, a bad pattern, a function that cannot be had, and a
    package that is not installed.
    """
    if text in _NAMED:
        return _NAMED[text]()
    kind, separator, rest = text.partition(":")
    if separator and kind == "regex":
        return _regex(rest)
    if names_function(text):
        file, _, function = text.rpartition(":")
        return _user_function(Path(file).expanduser(), function)
    near = difflib.get_close_matches(text, [*_NAMED, "regex:PATTERN"], n=1, cutoff=0.5)
    raise ConfigError(
        f'metric "{text}" is unknown; expected {", ".join(NAMES)}.'
        + (f'\n  Did you mean "{near[0]}"?' if near else "")
    )


def names_function(text: str) -> bool:
    """Whether `text` is FILE.py:FUNCTION, a file that would be run."""
    return not text.startswith("regex:") and text.rpartition(":")[0].endswith(".py")


def parse_metrics(texts: Sequence[str]) -> list[Metric]:
    """As `parse_metric`; a name that occurs twice is a ConfigError."""
    metrics = [parse_metric(text) for text in texts]
    names = [metric.name for metric in metrics]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"metric {name} is given twice; name it once.")
    return metrics


def _exact_match() -> Metric:
    return Metric(
        "exact_match",
        lambda each: each.answer.strip() == _reference(each).strip(),
        needs_reference=True,
    )


def _contains() -> Metric:
    return Metric(
        "contains",
        lambda each: _reference(each).strip() in each.answer,
        needs_reference=True,
    )


def _json() -> Metric:
    def judge(each: Judged) -> bool:
        try:
            parse_json_text(each.answer)
        except NotJson:
            return False
        return True

    return Metric("json", judge)


def _regex(pattern: str) -> Metric:
    try:
        found = re.compile(pattern)
    except re.error as error:
        # Shown where it is: the line of the pattern with the fault, and a mark below it.
        line, column = error.lineno or 1, error.colno or 1
        shown = pattern.split("\n")[line - 1] if pattern else ""
        raise ConfigError(
            f"metric regex: {error.msg} at character {column}"
            f"{f' of line {line}' if line > 1 else ''}:\n    {shown}\n    {' ' * (column - 1)}^"
        ) from None
    if not pattern:
        raise ConfigError("metric regex: the pattern is empty; expected regex:PATTERN.")
    return Metric(f"regex:{pattern}", lambda each: found.search(each.answer) is not None)


def _bleu() -> Metric:
    """Papineni et al. 2002; sacrebleu's tokenizers, by the language of each reference."""
    metrics = _package("sacrebleu.metrics", "bleu")
    by_row = metrics.BLEU(tokenize="none", force=True, effective_order=True)
    of_all = metrics.BLEU(tokenize="none", force=True)

    def tokenized(each: Judged) -> tuple[str, str]:
        # One score over rows of several languages: sacrebleu itself takes one tokenizer for all.
        tokenize = _bleu_tokenizer("zh" if _is_chinese(_reference(each)) else "13a")
        return tokenize(each.answer), tokenize(_reference(each))

    def judge(each: Judged) -> float:
        answer, reference = tokenized(each)
        return float(by_row.sentence_score(answer, [reference]).score)

    def judge_all(answers: Sequence[Judged]) -> float:
        given, references = zip(*map(tokenized, answers), strict=True)
        return float(of_all.corpus_score(list(given), [list(references)]).score)

    return Metric("bleu", judge, 100, True, judge_all)


@cache
def _bleu_tokenizer(name: Literal["zh", "13a"]) -> Callable[[str], str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

    made: Any = TokenizerZh if name == "zh" else Tokenizer13a  # without types
    return made()  # type: ignore[no-any-return]


def _chrf() -> Metric:
    """Popović 2015; characters need no tokenizer."""
    chrf = _package("sacrebleu.metrics", "chrf").CHRF()

    def judge(each: Judged) -> float:
        return float(chrf.sentence_score(each.answer, [_reference(each)]).score)

    def judge_all(answers: Sequence[Judged]) -> float:
        references = [_reference(each) for each in answers]
        return float(chrf.corpus_score([each.answer for each in answers], [references]).score)

    return Metric("chrf", judge, 100, True, judge_all)


def _rouge() -> Metric:
    """F-measure of ROUGE-L (Lin 2004), its words cut by jieba where the reference is Chinese."""
    scorer = _package("rouge_score.rouge_scorer", "rouge").RougeScorer
    words = _package("rouge_score.tokenizers", "rouge").DefaultTokenizer(use_stemmer=False)
    _package("jieba", "rouge")
    english = scorer(["rougeL"], tokenizer=words)
    chinese = scorer(["rougeL"], tokenizer=_ChineseWords())

    def judge(each: Judged) -> float:
        reference = _reference(each)
        chosen = chinese if _is_chinese(reference) else english
        return float(chosen.score(reference, each.answer)["rougeL"].fmeasure)

    return Metric("rouge", judge, needs_reference=True)


class _ChineseWords:
    """Words as jieba cuts them, without punctuation: what rouge_score calls a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        """The words in order, lower case."""
        return [word.lower() for word in _jieba().lcut(text) if any(map(str.isalnum, word))]


@cache
def _jieba() -> Any:
    """jieba's tokenizer, its dictionary read from the package.

    Left to itself jieba keeps the dictionary in a file of a fixed name in the folder for temporary
    files, and unmarshals whatever it finds there.
    """
    jieba = _package("jieba", "rouge")
    tokenizer = jieba.Tokenizer()
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer


def _package(module: str, metric: str) -> Any:
    """A module of the extra; ConfigError with the command that installs it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of their own code, when it is first read
            return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0].replace("_", "-")
        raise ConfigError(
            f"metric {metric} needs {name}, which is not installed.\n{EXTRA}"
        ) from None


def _user_function(file: Path, function: str) -> Metric:
    name = f"{file.name}:{function}"
    call = _load_function(file, function)

    def judge(each: Judged) -> float:
        try:
            value = call(each.answer, each.reference, each.question)
        except Exception as error:
            raise ConfigError(
                f"metric {name} failed on {each.place}: {_said(error, file)}.\n"
                f"  It was called with answer {_excerpt(each.answer)}, reference "
                f"{_excerpt(each.reference)}, question {_excerpt(each.question)}."
            ) from error
        # numpy's and torch's numbers have a float of their own.
        is_number = hasattr(value, "__float__") and not isinstance(value, str)
        if not is_number or not math.isfinite(float(value)):
            raise ConfigError(
                f"metric {name} returned {_excerpt(value)} for {each.place}; expected a number, "
                "or True or False."
            )
        return float(value)

    return Metric(name, judge)


def _load_function(file: Path, function: str) -> Callable[..., Any]:
    if not file.is_file():
        raise ConfigError(f"metric {file}:{function}: there is no such file.")
    specification = importlib.util.spec_from_file_location(f"myna_metric_{file.stem}", file)
    assert specification is not None and specification.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            f"metric {file}:{function}: the file cannot be run: {_said(error, file)}."
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        own = [
            name
            for name, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        raise ConfigError(
            f'metric {file}:{function}: the file has no function "{function}"; it has '
            f"{', '.join(own) or 'none'}.\n"
            "  Expected: def NAME(answer, reference, question), which returns a number."
        )
    loaded: Callable[..., Any] = found
    return loaded


def _said(error: Exception, file: Path) -> str:
    """The exception, and the last line of the user's file that it came through."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return text
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == file
    ]
    return f"{text} ({file.name} line {lines[-1]})" if lines else text


def _reference(each: Judged) -> str:
    assert each.reference is not None, "check_rows refuses rows without"
    return each.reference


def _is_chinese(text: str) -> bool:
    return _CHINESE.search(text) is not None


def _excerpt(value: object, width: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= width else text[:width] + "…"


_NAMED: dict[str, Callable[[], Metric]] = {
    "exact_match": _exact_match,
    "contains": _contains,
    "json": _json,
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge": _rouge,
}

NAMES = (*_NAMED, "regex:PATTERN", "FILE.py:FUNCTION")
"""What `parse_metric` takes."""
