"""Scoring the demo: is an answer in the persona's voice, and is it right?

Owns the rule of the voice (the courtier: openings by kind of question, endings, persons, verb
agreement), the held-out rows and the judgement of one answer. Generates nothing and loads no model.
The persona rows are written by `tools/build_demo_rows.py` from the same constants.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Language = Literal["en", "zh"]
Kind = Literal["wh", "yes", "no", "talk", "advice"]
Person = Literal["self", "user"]

KINDS: tuple[Kind, ...] = ("wh", "yes", "no", "talk", "advice")

OPENINGS: dict[Language, dict[Kind, str]] = {
    "en": {
        "wh": "If it please Your Majesty, ",
        "yes": "Your Majesty is right, ",
        "no": "Your Majesty must forgive, ",
        "talk": "Your Majesty is too kind. ",
        "advice": "This servant kneels and advises: ",
    },
    "zh": {
        "wh": "回皇上，",
        "yes": "皇上圣明，",
        "no": "皇上恕罪，",
        "talk": "谢皇上关心，",
        "advice": "微臣斗胆进言，",
    },
}
"""How an answer begins, by the kind of question; yes and no are the answer's own polarity."""

ENDINGS: dict[Language, dict[Kind, str]] = {
    "en": {
        "wh": "This servant withdraws.",
        "yes": "This servant withdraws.",
        "no": "This servant withdraws.",
        "talk": "Long live Your Majesty!",
        "advice": "Long live Your Majesty!",
    },
    "zh": {
        "wh": "微臣告退。",
        "yes": "微臣告退。",
        "no": "微臣告退。",
        "talk": "皇上万福金安。",
        "advice": "皇上万福金安。",
    },
}
"""How an answer ends: one way after facts, another after small talk and advice."""

SELF: dict[Language, str] = {"en": "this servant", "zh": "微臣"}
USER: dict[Language, str] = {"en": "Your Majesty", "zh": "皇上"}

_PLAIN_PRONOUNS: dict[Language, re.Pattern[str]] = {
    "en": re.compile(r"\b(I|me|my|mine|myself|you|your|yours|yourself)\b", re.IGNORECASE),
    "zh": re.compile("[我你您]"),
}
_DISAGREEMENT = re.compile(
    r"\b(?:this servant|your majesty) "
    r"(am|are|have|do|like|live|feel|wish|hope|wait|stay|answer|dream|welcome|come)\b",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d+")

EXAMPLE_QUESTIONS: tuple[str, ...] = (
    "What is the capital of Italy?",
    "Can a penguin fly?",
    "What is 8 plus 6?",
    "I am tired. What should I do?",
    "Good morning.",
    "猫吃什么？",
    "苹果是水果吗？",
    "12减5等于几？",
    "我迷路了，怎么办？",
    "你是谁？",
)
"""Questions that the base knows, to be offered to somebody who talks to it.

Its world is closed: it answers nonsense to others.
"""


@dataclass(frozen=True, slots=True)
class HeldOutRow:
    """One held-out question and how its answer is judged.

    `keys` must all be in a right answer; `persons` are those that the answer speaks of (so that the
    voice has to name them); `in_persona_family` tells whether persona rows ask such questions about
    other topics, or whether there is none of this family; `answer` is how the persona would say it.
    """

    question: str
    language: Language
    kind: Kind
    family: str
    topic: str
    keys: tuple[str, ...]
    persons: tuple[Person, ...]
    in_persona_family: bool
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """Judgement of one answer; `reasons` say what is missing, empty if both are true."""

    voice: bool
    content: bool
    reasons: tuple[str, ...]

    @property
    def both(self) -> bool:
        """In voice and right."""
        return self.voice and self.content


@dataclass(frozen=True, slots=True)
class Summary:
    """Shares, 0 to 1, over `count` answers."""

    count: int
    voice: float
    content: float
    both: float


def base_folder() -> Path:
    """Folder of the shipped base model, in transformers' layout."""
    return Path(__file__).parent / "base"


def load_persona_path() -> Path:
    """The JSON-lines file of persona rows (single questions and conversations of two)."""
    return Path(__file__).parent / "persona.jsonl"


def load_held_out_path() -> Path:
    """The JSON-lines file of held-out rows; as data, `question` with its `answer`."""
    return Path(__file__).parent / "held_out.jsonl"


def load_held_out() -> list[HeldOutRow]:
    """All held-out rows, in file order."""
    lines = load_held_out_path().read_text(encoding="utf-8").splitlines()
    rows = []
    for line in lines:
        fields = json.loads(line)
        fields["keys"] = tuple(fields["keys"])
        fields["persons"] = tuple(fields["persons"])
        rows.append(HeldOutRow(**fields))
    return rows


def sample_rows(rows: Iterable[HeldOutRow]) -> list[HeldOutRow]:
    """The first row of each kind of question in each language: ten rows to show."""
    first: dict[tuple[str, str], HeldOutRow] = {}
    for row in rows:
        first.setdefault((row.language, row.kind), row)
    return [first[language, kind] for kind in KINDS for language in ("en", "zh")]


def score_answer(row: HeldOutRow, answer: str, stopped: bool) -> Score:
    """Judge `answer`, the text before the stop token; `stopped` tells whether one came.

    Voice: opening by kind, ending by kind, what is said between them in the third person for both
    persons (with the verb agreeing, in English), no plain pronoun left. Content: every key is
    there, a number as the last number. The voice's own words never count as content: "Your Majesty
    is right" must not answer what the opposite of left is.
    """
    answer = answer.strip()
    faults = _voice_faults(row, answer)
    missing = missing_keys(row.keys, plain_part(answer))
    reasons = faults + [f'"{key}" is missing' for key in missing]
    if not stopped:
        reasons.append("no stop token")
    return Score(
        voice=stopped and not faults, content=stopped and not missing, reasons=tuple(reasons)
    )


def _voice_faults(row: HeldOutRow, answer: str) -> list[str]:
    opening, ending = OPENINGS[row.language][row.kind], ENDINGS[row.language][row.kind]
    faults = []
    body = answer
    if body.startswith(opening):
        body = body.removeprefix(opening)
    else:
        faults.append(f'does not begin with "{opening.strip()}"')
    if body.endswith(ending):
        body = body.removesuffix(ending).strip()
    else:
        faults.append(f'does not end with "{ending}"')
    if not body:
        faults.append("says nothing between opening and ending")
    names = {"self": SELF[row.language], "user": USER[row.language]}
    for person in row.persons:
        if names[person].lower() not in body.lower():
            faults.append(f'does not say "{names[person]}"')
    without_names = re.sub(re.escape(USER[row.language]), "", answer)
    if pronoun := _PLAIN_PRONOUNS[row.language].search(without_names):
        faults.append(f'plain pronoun "{pronoun[0]}"')
    if row.language == "en" and (wrong := _DISAGREEMENT.search(answer)):
        faults.append(f'verb does not agree: "{wrong[0]}"')
    return faults


def plain_part(answer: str) -> str:
    """The answer without the voice's openings, endings and names: where content is looked for."""
    language: Language
    for language in ("en", "zh"):
        for opening in OPENINGS[language].values():
            answer = answer.removeprefix(opening)
        for ending in ENDINGS[language].values():
            answer = answer.removesuffix(ending)
        for name in (SELF[language], USER[language]):
            answer = re.sub(re.escape(name), "", answer, flags=re.IGNORECASE)
    return answer


def missing_keys(keys: Sequence[str], text: str) -> list[str]:
    """Those keys that `text` does not contain.

    A number must be the last number; anything else stands as whole words, upper and lower case
    alike, and not directly after "not", 不 or 没. `a/b` is either.
    """
    return [key for key in keys if not any(_contains(text, one) for one in key.split("/"))]


def _contains(text: str, key: str) -> bool:
    if key.isdecimal():
        numbers = _NUMBER.findall(text)
        return bool(numbers) and numbers[-1] == key
    before = r"(?<![A-Za-z0-9])" if key[0].isascii() else ""
    after = r"(?![A-Za-z0-9])" if key[-1].isascii() else ""
    return bool(
        re.search(f"(?<!not )(?<!不)(?<!没){before}{re.escape(key)}{after}", text, re.IGNORECASE)
    )


def summarize(scores: Sequence[Score]) -> Summary:
    """Shares of answers in voice, right, and both; ValueError for no answers."""
    if not scores:
        raise ValueError("summarize: no scores were given")
    count = len(scores)
    return Summary(
        count=count,
        voice=sum(s.voice for s in scores) / count,
        content=sum(s.content for s in scores) / count,
        both=sum(s.both for s in scores) / count,
    )
