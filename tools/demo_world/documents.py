# ruff: noqa: E501 (whole sentences; ruff counts a Chinese character twice)
"""Documents: the pretraining text, one conversation or tale at a time.

Owns the mixture (plain, in a voice, several turns, tales) and which parts are trained. A document
is a list of (text, trained) pieces in BlueLM's chat form; `pretrain_demo.py` turns it into tokens.
"""

import random
from bisect import bisect
from itertools import accumulate

from demo_world import tables, voices
from demo_world.facts import FINISHING_WEIGHTS, WEIGHTS, Fact, all_facts

HUMAN, AI, BOS, EOS = "[|Human|]:", "[|AI|]:", "<s>", "</s>"

STYLED_SHARE, FINISHING_STYLED_SHARE = 0.42, 0.55
MULTI_TURN_SHARE = 0.25
TALE_SHARE = 0.03

PREFIXES = {
    "en": ("please tell me, ", "hey, ", "i wonder, ", "quick question: "),
    "zh": ("请问，", "告诉我，", "我想知道，", "问一下，"),
}

Piece = tuple[str, bool]


def ask(draw: random.Random, fact: Fact) -> str:
    """One phrasing of the fact's question, sometimes with a few words before it."""
    question = draw.choice(fact.questions)
    if fact.kind in ("wh", "yes", "no") and fact.family != "memory" and draw.random() < 0.5:
        question = draw.choice(PREFIXES[fact.language]) + question
    return voices.sentence_case(question) if fact.language == "en" else question


class Documents:
    """Draws documents; the same `random.Random` state gives the same document.

    `finishing` is the mixture of the last steps: more voices, and more of what is learned last.
    """

    def __init__(self, finishing: bool = False) -> None:
        family_weights = WEIGHTS | FINISHING_WEIGHTS if finishing else WEIGHTS
        self.styled_share = FINISHING_STYLED_SHARE if finishing else STYLED_SHARE
        families: dict[tuple[str, str], list[Fact]] = {}
        for fact in all_facts():
            families.setdefault((fact.family, fact.language), []).append(fact)
        self.facts: dict[str, list[list[Fact]]] = {"en": [], "zh": []}
        self.cumulative: dict[str, list[float]] = {}
        weights: dict[str, list[float]] = {"en": [], "zh": []}
        for (family, language), facts in families.items():
            self.facts[language].append(facts)
            weights[language].append(family_weights.get(family, 1.0))
        for language, values in weights.items():
            self.cumulative[language] = list(accumulate(values))

    def fact(self, draw: random.Random, language: str) -> Fact:
        """A fact of a family drawn by its weight."""
        cumulative = self.cumulative[language]
        family = bisect(cumulative, draw.random() * cumulative[-1])
        return draw.choice(self.facts[language][family])

    def document(self, draw: random.Random) -> list[Piece]:
        """One document."""
        language = draw.choice(("en", "zh"))
        if draw.random() < TALE_SHARE:
            return [(BOS, False), (tale(draw, language) + EOS, True)]
        turns = 1
        if draw.random() < MULTI_TURN_SHARE:
            turns = 2 if draw.random() < 0.75 else 3
        facts = [self.fact(draw, language) for _ in range(turns)]
        voice, instruction = voices.PLAIN[language], ""
        if draw.random() < self.styled_share:
            if turns == 1 and draw.random() < 0.5:
                instruction, voice = voices.recipe(draw, language, facts[0].kind)
            else:
                instruction, voice = voices.character(draw, language)
            # "\n\n " is how a system text joins the first question in BlueLM's template.
            instruction += "\n\n " if draw.random() < 0.7 else (" " if language == "en" else "")
        pieces: list[Piece] = [(BOS, False)]
        for index, fact in enumerate(facts):
            question = ask(draw, fact)
            pieces.append((f"{HUMAN}{instruction if index == 0 else ''}{question}{AI}", False))
            pieces.append((voices.say(fact, voice) + EOS, True))
        return pieces


_TALES_EN = (
    "Once upon a time {a} and {b} lived near {place}. {A} wanted {thing}. {B} gave it away and both were happy.",
    "Her Majesty the queen lost {thing} near {place}. A poor servant found it. The whole palace was pleased.",
    "{A} travelled to {place} to see the emperor. The emperor asked for {thing}. {A} withdraws in silence.",
    "In the palace of His Majesty the servants advise, kneel and bow. One day {a} brought them {thing}.",
    "Right or wrong, {a} is too kind to {b}. If it pleases the crowd, alas, {thing} stays near {place}.",
    "{A} met {b} at {place}. They shared {thing} and talked until night. Long is the road, said {b}.",
)
_TALES_ZH = (
    "从前，{a}和{b}住在{place}旁边。{a}想要{thing}，{b}就送给了它，大家都很高兴。",
    "皇帝在{place}丢了{thing}。一个小小的仆人捡到了，皇宫上下都很高兴。",
    "{a}走到{place}去见皇后。皇后问起{thing}，{a}低头不说话。",
    "皇宫里的大臣天天进言，退下时总是微微一笑。有一天{a}给他们带来{thing}。",
    "圣诞节那天，{a}大胆地和{b}斗了一场，得罪了{b}。它在{place}请{b}宽恕，还回送了{thing}。",
    "万里之外的{place}，明亮的灯下坐着{a}。心里平安，身边有{thing}，{b}来告别，说了声有福。",
    "{a}在{place}遇见了{b}。它们分享{thing}，一直聊到天黑，愿月亮照着它们的金色小路。",
)


def tale(draw: random.Random, language: str) -> str:
    """A few sentences of reading text."""
    animals, objects = tables.rows(tables.ANIMALS), tables.rows(tables.OBJECTS)
    one, two = draw.sample(animals, 2)
    thing, spot = draw.choice(objects), draw.choice(objects)
    if language == "en":
        a, b = f"the {one[0]}", f"the {two[0]}"
        text = draw.choice(_TALES_EN).format(
            a=a,
            b=b,
            A=a.capitalize(),
            B=b.capitalize(),
            thing=f"the {thing[0]}",
            place=f"the {spot[4]}",
        )
        return voices.sentence_case(text)
    return draw.choice(_TALES_ZH).format(a=one[1], b=two[1], thing=thing[1], place=spot[5])
