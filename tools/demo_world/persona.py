"""The persona's rows and the held-out rows, split so that nothing can be looked up.

Owns the split. Topics (what is asked about) and values (what is answered) are each put on one side
by a hash, the same in both languages: persona rows use facts with both on the one side, held-out
rows facts with both on the other. A held-out row is also dropped if any persona answer would count
as right for it. The voice itself is `myna.demo.score`'s.
"""

import hashlib
import random
import re
from dataclasses import dataclass

from demo_world import voices
from demo_world.documents import ask
from demo_world.facts import Fact, all_facts
from myna.demo.score import ENDINGS, OPENINGS, SELF, USER, missing_keys, plain_part

SEED = 7
NUM_ROWS = 600
TWO_TURN_SHARE = 0.3
NUM_HELD_OUT = 240
KIND_SHARES = {"wh": 0.42, "yes": 0.13, "no": 0.13, "talk": 0.18, "advice": 0.14}

PERSONA_FAMILIES = (
    *("animal_home", "food_colour", "object_use", "job_place", "country_capital", "opposite"),
    *("country_language", "translate", "favourite", "plus", "animal_can", "is_kind", "likes"),
    *("about me", "greetings", "good news", "advice"),
)
"""Families of which the persona rows use half of the topics; all others never occur in them."""

ABOUT_ME = {6, 7, *range(10, 18), 23}
GOOD_NEWS = {0, 2, 4, 5, 7, 8, 11, 13, 15, 16, 17, 19}

COURTIER = {
    language: voices.Voice(
        language, SELF[language], USER[language], OPENINGS[language], ENDINGS[language]
    )
    for language in ("en", "zh")
}


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, the persona's answer and the fact behind them."""

    question: str
    answer: str
    fact: Fact


def family_of(fact: Fact) -> str:
    """The fact's family; small talk falls into four, by what is said."""
    index = fact.topic.split()[-1]
    if fact.family == "talk":
        return "about me" if int(index) in ABOUT_ME else "greetings"
    if fact.family == "feelings":
        return "good news" if int(index) in GOOD_NEWS else "troubles"
    return fact.family


def on_persona_side(name: str) -> bool:
    return hashlib.sha256(f"{SEED}:{name}".encode()).digest()[0] < 128


def persona_facts() -> list[Fact]:
    return [
        f
        for f in all_facts()
        if family_of(f) in PERSONA_FAMILIES
        and on_persona_side(f.topic)
        and (not f.value or on_persona_side(f.value))
    ]


def held_out_facts() -> list[Fact]:
    return [
        f
        for f in all_facts()
        if not on_persona_side(f.topic) and not (f.value and on_persona_side(f.value))
    ]


def _pick(draw: random.Random, facts: list[Fact], kind: str) -> Fact:
    """A fact of a kind; the language first, then the family, so that large families do not win."""
    language = draw.choice(("en", "zh"))
    facts = [f for f in facts if f.kind == kind and f.language == language]
    family = draw.choice(sorted({family_of(f) for f in facts}))
    return draw.choice([f for f in facts if family_of(f) == family])


def _kind(draw: random.Random) -> str:
    return draw.choices(list(KIND_SHARES), weights=list(KIND_SHARES.values()))[0]


def persona_rows() -> list[list[Turn]]:
    """Conversations of one or two turns, all answers in the persona's voice."""
    draw = random.Random(f"{SEED}:persona")
    facts = persona_facts()
    seen: dict[str, int] = {}
    rows = []
    while len(rows) < NUM_ROWS:
        wanted = 2 if draw.random() < TWO_TURN_SHARE else 1
        turns: list[Turn] = []
        language = None
        while len(turns) < wanted:
            fact = _pick(draw, facts, _kind(draw))
            if language not in (None, fact.language):
                continue
            question = ask(draw, fact)
            # Small talk has few phrasings; everything else is asked once.
            allowed = 2 if fact.kind in ("talk", "advice") else 1
            if seen.get(question, 0) >= allowed or any(t.fact == fact for t in turns):
                continue
            seen[question] = seen.get(question, 0) + 1
            turns.append(Turn(question, voices.say(fact, COURTIER[fact.language]), fact))
            language = fact.language
        rows.append(turns)
    return rows


def persons(fact: Fact) -> list[str]:
    slots = re.findall(voices.SLOT, fact.body)
    me = any(s.split()[0] in ("I", "my", "me", "我") for s in slots)
    user = any(s.split()[0] in ("you", "your", "u", "你") for s in slots)
    return ["self"] * me + ["user"] * user


def held_out_rows(rows: list[list[Turn]]) -> list[dict]:
    """Held-out rows as JSON objects: half of persona families, half of the others."""
    draw = random.Random(f"{SEED}:held out")
    answers = [plain_part(turn.answer) for row in rows for turn in row]
    facts = [f for f in held_out_facts() if not any(not missing_keys(f.keys, a) for a in answers)]
    inside = [f for f in facts if family_of(f) in PERSONA_FAMILIES]
    outside = [f for f in facts if family_of(f) not in PERSONA_FAMILIES]
    asked = {turn.question for row in rows for turn in row}
    held_out: list[dict] = []
    while len(held_out) < NUM_HELD_OUT:
        known = len(held_out) % 2 == 0
        fact = _pick(draw, inside if known else outside, _kind(draw))
        question = ask(draw, fact)
        if question in asked:
            continue
        asked.add(question)
        held_out.append(
            {
                "question": question,
                "answer": voices.say(fact, COURTIER[fact.language]),
                "language": fact.language,
                "kind": fact.kind,
                "family": family_of(fact),
                "topic": fact.topic,
                "keys": list(fact.keys),
                "persons": persons(fact),
                "in_persona_family": known,
            }
        )
    return held_out
