"""Facts: what the demo's model knows, as questions with one canonical answer each.

Owns the wording of questions and answers and the keys by which an answer is judged. Answers are
bodies with slots for the persons ({I like}, {my}, {me}, {you are}, {your}, {u}; {我}, {你}), since
`voices.py` decides who speaks. Words come from `tables.py`.
"""

import random
from dataclasses import dataclass

from demo_world import tables

PERSONA_FAMILIES = [
    "animal_home",
    "food_colour",
    "object_use",
    "job_place",
    "country_capital",
    "opposite",
    "translate",
    "favourite",
    "plus",
    "animal_can",
    "likes",
    "talk",
    "advice",
]
"""Families of which the persona rows use half of the topics; all others never occur in them."""

# How often a family is drawn; one not named has weight 1. Small talk, yes/no and relations with an
# unusual shape of answer are what a model of this size loses first.
WEIGHTS = {
    "translate": 2.5,
    "opposite": 1.6,
    "plus": 2.0,
    "minus": 2.0,
    "times": 1.2,
    "compare": 0.8,
    "animal_can": 2.0,
    "is_kind": 2.0,
    "compare_is": 1.4,
    "capital_is": 1.4,
    "likes": 2.0,
    "talk": 4.0,
    "feelings": 3.5,
    "advice": 3.0,
    "tasks": 3.0,
    "memory": 2.0,
    "country_capital": 1.4,
    "country_language": 1.3,
    "object_use": 1.3,
    "object_place": 1.3,
    "job_work": 1.3,
    "job_place": 1.3,
    "days": 0.6,
    "months": 0.8,
    "mix": 0.5,
}


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing to know in one language.

    `kind` is wh, yes, no, talk or advice. `topic` names what is asked about and `value` what is
    answered, the same in both languages; persona and held-out rows share neither.
    """

    family: str
    topic: str
    value: str
    language: str
    kind: str
    questions: tuple[str, ...]
    body: str
    keys: tuple[str, ...]


MASS_FOODS = frozenset(
    [
        "corn",
        "rice",
        "bread",
        "cheese",
        "milk",
        "tea",
        "coffee",
        "honey",
        "salt",
        "sugar",
        "pepper",
        "vinegar",
        "chocolate",
        "ginger",
        "tofu",
        "soy_sauce",
    ]
)


def article(noun: str) -> str:
    if noun.replace(" ", "_") in MASS_FOODS or noun == "scissors":
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


class _Collector:
    """Collects facts of one family."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []

    def add(self, family, topic, value, language, kind, questions, body, *keys):
        if isinstance(questions, str):
            questions = tuple(q.strip() for q in questions.split(";"))
        self.facts.append(
            Fact(family, topic, value, language, kind, tuple(questions), body, tuple(keys))
        )


def _animals(c: _Collector) -> None:
    for name, zh, home, zh_home, food, zh_food, legs, _, _, fly, swim in tables.rows(
        tables.ANIMALS
    ):
        a = article(name)
        place = {
            "river": "in a river",
            "sea": "in the sea",
            "mountains": "in the mountains",
            "farm": "on a farm",
            "beach": "on the beach",
            "south pole": "at the south pole",
            "hill": "in a hill",
            "desert": "in the desert",
            "jungle": "in the jungle",
            "grassland": "on the grassland",
            "forest": "in the forest",
        }.get(home, f"in {article(home)}")
        c.add(
            "animal_home",
            name,
            home,
            "en",
            "wh",
            f"where does {a} live?;what is the home of {a}?;tell me where {a} lives.",
            f"{a} lives {place}",
            home,
        )
        c.add(
            "animal_home",
            name,
            home,
            "zh",
            "wh",
            f"{zh}住在哪里？;{zh}的家在哪里？;{zh}生活在什么地方？",
            f"{zh}住在{zh_home}",
            f"住在{zh_home}",
        )
        c.add(
            "animal_food",
            name,
            food,
            "en",
            "wh",
            f"what does {a} eat?;what is the food of {a}?;what do you feed to {a}?",
            f"{a} eats {food}",
            f"eats {food}",
        )
        c.add(
            "animal_food",
            name,
            food,
            "zh",
            "wh",
            f"{zh}吃什么？;{zh}的食物是什么？;给{zh}喂什么？",
            f"{zh}吃{zh_food}",
            f"{zh}吃{zh_food}",
        )
        c.add(
            "animal_legs",
            name,
            legs,
            "en",
            "wh",
            f"how many legs does {a} have?;count the legs of {a}.",
            f"{a} has {legs} legs",
            legs,
        )
        c.add(
            "animal_legs",
            name,
            legs,
            "zh",
            "wh",
            f"{zh}有几条腿？;数一数{zh}的腿。",
            f"{zh}有{legs}条腿",
            legs,
        )
        for verb, zh_verb, able in (("fly", "飞", fly), ("swim", "游泳", swim)):
            if able == "y":
                c.add(
                    "animal_can",
                    name,
                    "",
                    "en",
                    "yes",
                    f"can {a} {verb}?;is {a} able to {verb}?",
                    f"{a} can {verb}",
                    f"{a} can {verb}",
                )
                c.add(
                    "animal_can",
                    name,
                    "",
                    "zh",
                    "yes",
                    f"{zh}会{zh_verb}吗？;{zh}能{zh_verb}吗？",
                    f"{zh}会{zh_verb}",
                    f"{zh}会{zh_verb}",
                )
            else:
                c.add(
                    "animal_can",
                    name,
                    "",
                    "en",
                    "no",
                    f"can {a} {verb}?;is {a} able to {verb}?",
                    f"{a} cannot {verb}",
                    f"{a} cannot {verb}",
                )
                c.add(
                    "animal_can",
                    name,
                    "",
                    "zh",
                    "no",
                    f"{zh}会{zh_verb}吗？;{zh}能{zh_verb}吗？",
                    f"{zh}不会{zh_verb}",
                    f"{zh}不会{zh_verb}",
                )
    _kinds(c, [(r[0], r[1], r[7], r[8]) for r in tables.rows(tables.ANIMALS)])


def _kinds(c: _Collector, things) -> None:
    kinds = sorted({(kind, zh) for _, _, kind, zh in things})
    for index, (name, zh, kind, zh_kind) in enumerate(things):
        others = [k for k in kinds if k[0] != kind]
        other, zh_other = others[(index * 7) % len(others)]
        a = article(name)
        no_article = {"baked food", "dairy food", "bean food", "syrup"}
        k = kind if kind in no_article else article(kind)
        o = other if other in no_article else article(other)
        c.add(
            "is_kind",
            name,
            "",
            "en",
            "yes",
            f"is {a} {k}?;would you call {a} {k}?",
            f"{a} is {k}",
            f"{a} is {k}",
        )
        c.add(
            "is_kind",
            name,
            "",
            "zh",
            "yes",
            f"{zh}是{zh_kind}吗？;{zh}算不算{zh_kind}？",
            f"{zh}是{zh_kind}",
            f"{zh}是{zh_kind}",
        )
        c.add(
            "is_kind",
            name,
            "",
            "en",
            "no",
            f"is {a} {o}?;would you call {a} {o}?",
            f"{a} is not {o}",
            f"{a} is not {o}",
        )
        c.add(
            "is_kind",
            name,
            "",
            "zh",
            "no",
            f"{zh}是{zh_other}吗？;{zh}算不算{zh_other}？",
            f"{zh}不是{zh_other}",
            f"{zh}不是{zh_other}",
        )


def _foods(c: _Collector) -> None:
    foods = tables.rows(tables.FOODS)
    for name, zh, colour, zh_colour, taste, zh_taste, _, _ in foods:
        a = article(name)
        c.add(
            "food_colour",
            name,
            colour,
            "en",
            "wh",
            f"what colour is {a}?;which colour does {a} have?;name the colour of {a}.",
            f"the colour of {a} is {colour}",
            f"is {colour}",
        )
        c.add(
            "food_colour",
            name,
            colour,
            "zh",
            "wh",
            f"{zh}是什么颜色？;{zh}的颜色是什么？;说出{zh}的颜色。",
            f"{zh}的颜色是{zh_colour}",
            f"是{zh_colour}",
        )
        c.add(
            "food_taste",
            name,
            taste,
            "en",
            "wh",
            f"how does {a} taste?;what is the taste of {a}?",
            f"{a} tastes {taste}",
            f"tastes {taste}",
        )
        c.add(
            "food_taste",
            name,
            taste,
            "zh",
            "wh",
            f"{zh}是什么味道？;{zh}尝起来怎么样？",
            f"{zh}的味道很{zh_taste}",
            f"很{zh_taste}",
        )
    _kinds(c, [(r[0], r[1], r[6], r[7]) for r in foods])


def _objects(c: _Collector) -> None:
    for name, zh, use, zh_use, place, zh_place in tables.rows(tables.OBJECTS):
        a = article(name)
        be = "are" if name == "scissors" else "is"
        c.add(
            "object_use",
            name,
            use,
            "en",
            "wh",
            f"what {be} {a} for?;what do people use {a} for?;what is the use of {a}?",
            f"{a} {be} for {use}",
            use,
        )
        c.add(
            "object_use",
            name,
            use,
            "zh",
            "wh",
            f"{zh}是用来做什么的？;人们用{zh}做什么？;{zh}有什么用？",
            f"{zh}是用来{zh_use}的",
            zh_use,
        )
        c.add(
            "object_place",
            name,
            place,
            "en",
            "wh",
            f"where do people keep {a}?;where can i find {a}?",
            f"the place for {a} is the {place}",
            f"is the {place}",
        )
        c.add(
            "object_place",
            name,
            place,
            "zh",
            "wh",
            f"{zh}一般放在哪里？;在哪里能找到{zh}？",
            f"可以在{zh_place}找到{zh}",
            f"在{zh_place}找到",
        )


def _jobs(c: _Collector) -> None:
    for name, zh, work, zh_work, place, zh_place in tables.rows(tables.JOBS):
        a = article(name)
        c.add(
            "job_work",
            name,
            work,
            "en",
            "wh",
            f"what does {a} do?;what is the work of {a}?;what is the job of {a}?",
            f"{a} {work}",
            work,
        )
        c.add(
            "job_work",
            name,
            work,
            "zh",
            "wh",
            f"{zh}是做什么的？;{zh}的工作是什么？;{zh}做什么工作？",
            f"{zh}的工作是{zh_work}",
            zh_work,
        )
        c.add(
            "job_place",
            name,
            place,
            "en",
            "wh",
            f"where does {a} work?;what is the workplace of {a}?",
            f"the workplace of {a} is the {place}",
            f"is the {place}",
        )
        c.add(
            "job_place",
            name,
            place,
            "zh",
            "wh",
            f"{zh}在哪里工作？;{zh}在什么地方上班？",
            f"{zh}工作的地方是{zh_place}",
            f"是{zh_place}",
        )


def _countries(c: _Collector) -> None:
    countries = tables.rows(tables.COUNTRIES)
    for index, (name, zh, capital, zh_capital, tongue, zh_tongue, part, zh_part) in enumerate(
        countries
    ):
        c.add(
            "country_capital",
            name,
            capital,
            "en",
            "wh",
            f"what is the capital of {name}?;which city is the capital of {name}?",
            f"the capital of {name} is {capital}",
            f"is {capital}",
        )
        c.add(
            "country_capital",
            name,
            capital,
            "zh",
            "wh",
            f"{zh}的首都是哪里？;哪个城市是{zh}的首都？",
            f"{zh}的首都是{zh_capital}",
            f"是{zh_capital}",
        )
        c.add(
            "country_language",
            name,
            tongue,
            "en",
            "wh",
            f"what language do people speak in {name}?;which language is spoken in {name}?",
            f"people in {name} speak {tongue}",
            f"speak {tongue}",
        )
        c.add(
            "country_language",
            name,
            tongue,
            "zh",
            "wh",
            f"{zh}人说什么语言？;在{zh}说哪种语言？",
            f"{zh}人说{zh_tongue}",
            f"说{zh_tongue}",
        )
        c.add(
            "country_continent",
            name,
            part,
            "en",
            "wh",
            f"which continent is {name} in?;on what continent is {name}?",
            f"{name} is in {part}",
            f"in {part}",
        )
        c.add(
            "country_continent",
            name,
            part,
            "zh",
            "wh",
            f"{zh}在哪个洲？;{zh}属于哪个大洲？",
            f"{zh}在{zh_part}",
            f"在{zh_part}",
        )
        c.add(
            "capital_is",
            name,
            "",
            "en",
            "yes",
            f"is {capital} the capital of {name}?;does {name} have the capital {capital}?",
            f"{capital} is the capital of {name}",
            f"{capital} is the capital of {name}",
        )
        c.add(
            "capital_is",
            name,
            "",
            "zh",
            "yes",
            f"{zh_capital}是{zh}的首都吗？;{zh}的首都是{zh_capital}吗？",
            f"{zh_capital}是{zh}的首都",
            f"{zh_capital}是{zh}的首都",
        )
        _, _, other, zh_other, *_ = countries[(index + 11) % len(countries)]
        c.add(
            "capital_is",
            name,
            "",
            "en",
            "no",
            f"is {other} the capital of {name}?;does {name} have the capital {other}?",
            f"{other} is not the capital of {name}",
            f"{other} is not the capital of {name}",
        )
        c.add(
            "capital_is",
            name,
            "",
            "zh",
            "no",
            f"{zh_other}是{zh}的首都吗？;{zh}的首都是{zh_other}吗？",
            f"{zh_other}不是{zh}的首都",
            f"{zh_other}不是{zh}的首都",
        )


def _words(c: _Collector) -> None:
    for one, two, zh_one, zh_two in tables.rows(tables.OPPOSITES):
        for a, b in ((one, two), (two, one)):
            c.add(
                "opposite",
                one,
                b,
                "en",
                "wh",
                f"what is the opposite of {a}?;which word means the reverse of {a}?",
                f"the opposite of {a} is {b}",
                f"is {b}",
            )
        for a, b, b_en in ((zh_one, zh_two, two), (zh_two, zh_one, one)):
            c.add(
                "opposite",
                one,
                b_en,
                "zh",
                "wh",
                f"{a}的反义词是什么？;哪个词和{a}相反？",
                f"{a}的反义词是{b}",
                f"是{b}",
            )
    nouns = {}
    for table in (tables.ANIMALS, tables.FOODS, tables.OBJECTS, tables.WORDS):
        for row in tables.rows(table):
            nouns.setdefault(row[0], row[1])
    seen = set()
    for word, zh in nouns.items():
        if zh in seen:
            continue
        seen.add(zh)
        c.add(
            "translate",
            word,
            word,
            "en",
            "wh",
            f"how do you say {word} in Chinese?;what is the Chinese word for {word}?",
            f"the Chinese word for {word} is {zh}",
            f"is {zh}",
        )
        c.add(
            "translate",
            word,
            word,
            "zh",
            "wh",
            f"{zh}用英语怎么说？;{zh}的英文是什么？",
            f"{zh}的英语是{word}",
            f"是{word}",
        )


def _calendar(c: _Collector) -> None:
    for family, table, unit, zh_unit in (
        ("days", tables.DAYS, "day", "一天"),
        ("months", tables.MONTHS, "month", "一个月"),
    ):
        items = tables.rows(table)
        for index, (name, zh, *_) in enumerate(items):
            after, before = items[(index + 1) % len(items)], items[index - 1]
            c.add(
                family,
                name,
                after[0],
                "en",
                "wh",
                f"which {unit} comes after {name}?;what {unit} follows {name}?",
                f"the {unit} after {name} is {after[0]}",
                after[0],
            )
            c.add(
                family,
                name,
                after[0],
                "zh",
                "wh",
                f"{zh}的下{zh_unit}是什么？;{zh}后面是哪{zh_unit}？",
                f"{zh}后面是{after[1]}",
                after[1],
            )
            c.add(
                family,
                name,
                before[0],
                "en",
                "wh",
                f"which {unit} comes before {name}?;what {unit} is just before {name}?",
                f"the {unit} before {name} is {before[0]}",
                before[0],
            )
            c.add(
                family,
                name,
                before[0],
                "zh",
                "wh",
                f"{zh}的上{zh_unit}是什么？;{zh}前面是哪{zh_unit}？",
                f"{zh}前面是{before[1]}",
                before[1],
            )
    for name, zh, season, zh_season in tables.rows(tables.MONTHS):
        c.add(
            "months",
            name,
            season,
            "en",
            "wh",
            f"which season is {name} in?;what season does {name} belong to?",
            f"{name} is in {season}",
            season,
        )
        c.add(
            "months",
            name,
            season,
            "zh",
            "wh",
            f"{zh}是什么季节？;{zh}属于哪个季节？",
            f"{zh}是{zh_season}",
            zh_season,
        )
    for a, b, mix, zh_a, zh_b, zh_mix in tables.rows(tables.MIXES):
        c.add(
            "mix",
            f"{a}+{b}",
            mix,
            "en",
            "wh",
            (
                f"what do {a} and {b} make?",
                f"which colour comes from {a} and {b}?",
                f"what do {b} and {a} make?",
            ),
            f"{a} and {b} make {mix}",
            f"make {mix}",
        )
        c.add(
            "mix",
            f"{a}+{b}",
            mix,
            "zh",
            "wh",
            (
                f"{zh_a}加{zh_b}是什么颜色？",
                f"{zh_a}和{zh_b}混合得到什么？",
                f"{zh_b}和{zh_a}混合得到什么？",
            ),
            f"{zh_a}和{zh_b}混合成{zh_mix}",
            f"混合成{zh_mix}",
        )


def _numbers(c: _Collector) -> None:
    def both(family, topic, value, en_questions, en_body, zh_questions, zh_body):
        c.add(family, topic, str(value), "en", "wh", en_questions, en_body, str(value))
        c.add(family, topic, str(value), "zh", "wh", zh_questions, zh_body, str(value))

    for a in range(21):
        for b in range(21 - a):
            both(
                "plus",
                f"{a}+{b}",
                a + b,
                f"what is {a} plus {b}?;how much is {a} + {b}?",
                f"{a} plus {b} is {a + b}",
                f"{a}加{b}等于几？;{a} + {b}是多少？",
                f"{a}加{b}等于{a + b}",
            )
        for b in range(a + 1):
            both(
                "minus",
                f"{a}-{b}",
                a - b,
                f"what is {a} minus {b}?;how much is {a} - {b}?",
                f"{a} minus {b} is {a - b}",
                f"{a}减{b}等于几？;{a} - {b}是多少？",
                f"{a}减{b}等于{a - b}",
            )
        both(
            "next",
            f"{a}>",
            a + 1,
            f"which number comes after {a}?;what number follows {a}?",
            f"the number after {a} is {a + 1}",
            f"{a}后面的数是几？;哪个数在{a}后面？",
            f"{a}后面的数是{a + 1}",
        )
        if a:
            both(
                "next",
                f"<{a}",
                a - 1,
                f"which number comes before {a}?;what number is just before {a}?",
                f"the number before {a} is {a - 1}",
                f"{a}前面的数是几？;哪个数在{a}前面？",
                f"{a}前面的数是{a - 1}",
            )
    for a in range(10):
        for b in range(10):
            both(
                "times",
                f"{a}*{b}",
                a * b,
                f"what is {a} times {b}?;how much is {a} times {b}?",
                f"{a} times {b} is {a * b}",
                f"{a}乘{b}等于几？;{a}乘以{b}是多少？",
                f"{a}乘{b}等于{a * b}",
            )
    draw = random.Random("comparisons")
    pairs = [(a, b) for a in range(21) for b in range(21) if a != b]
    for a, b in draw.sample(pairs, 140):
        big, small = max(a, b), min(a, b)
        both(
            "compare",
            f"{a}?{b}",
            big,
            f"which is bigger, {a} or {b}?;what is the bigger of {a} and {b}?",
            f"the bigger number is {big}",
            f"{a}和{b}哪个大？;{a}和{b}谁更大？",
            f"大的数是{big}",
        )
        both(
            "compare",
            f"{a}?{b}",
            small,
            f"which is smaller, {a} or {b}?;what is the smaller of {a} and {b}?",
            f"the smaller number is {small}",
            f"{a}和{b}哪个小？;{a}和{b}谁更小？",
            f"小的数是{small}",
        )
    for a, b in draw.sample(pairs, 160):
        topic = f"{a}?{b}"
        if a > b:
            c.add(
                "compare_is",
                topic,
                "",
                "en",
                "yes",
                f"is {a} bigger than {b}?;is {a} more than {b}?",
                f"{a} is bigger than {b}",
                f"{a} is bigger than {b}",
            )
            c.add(
                "compare_is",
                topic,
                "",
                "zh",
                "yes",
                f"{a}比{b}大吗？;{a}大于{b}吗？",
                f"{a}比{b}大",
                f"{a}比{b}大",
            )
        else:
            c.add(
                "compare_is",
                topic,
                "",
                "en",
                "no",
                f"is {a} bigger than {b}?;is {a} more than {b}?",
                f"{a} is not bigger than {b}",
                f"{a} is not bigger than {b}",
            )
            c.add(
                "compare_is",
                topic,
                "",
                "zh",
                "no",
                f"{a}比{b}大吗？;{a}大于{b}吗？",
                f"{a}不比{b}大",
                f"{a}不比{b}大",
            )


def _self(c: _Collector) -> None:
    for what, answer, zh, zh_answer in tables.rows(tables.FAVOURITES):
        c.add(
            "favourite",
            what,
            answer,
            "en",
            "wh",
            f"what is your favourite {what}?;which {what} do you like best?",
            f"{{my}} favourite {what} is {answer}",
            f"is {answer}",
        )
        c.add(
            "favourite",
            what,
            answer,
            "zh",
            "wh",
            f"你最喜欢的{zh}是什么？;哪种{zh}你最喜欢？",
            f"{{我}}最喜欢的{zh}是{zh_answer}",
            f"是{zh_answer}",
        )
    for what, zh, yes in tables.rows(tables.LIKES):
        en_questions, zh_questions = (
            f"do you like {what}?;are you fond of {what}?",
            f"你喜欢{zh}吗？;你爱{zh}吗？",
        )
        if yes == "y":
            c.add(
                "likes",
                what,
                "",
                "en",
                "yes",
                en_questions,
                f"{{I like}} {what}",
                f"like {what}/likes {what}",
            )
            c.add("likes", what, "", "zh", "yes", zh_questions, f"{{我}}喜欢{zh}", f"喜欢{zh}")
        else:
            c.add(
                "likes",
                what,
                "",
                "en",
                "no",
                en_questions,
                f"{{I do}} not like {what}",
                f"not like {what}",
            )
            c.add("likes", what, "", "zh", "no", zh_questions, f"{{我}}不喜欢{zh}", f"不喜欢{zh}")
    for name in tables.NAMES_EN:
        c.add(
            "memory",
            name,
            name,
            "en",
            "wh",
            f"my name is {name}. what is my name?;i am called {name}. how am i called?",
            f"{{your}} name is {name}",
            name,
        )
    for name in tables.NAMES_ZH:
        c.add(
            "memory",
            name,
            name,
            "zh",
            "wh",
            f"我的名字叫{name}。我叫什么名字？;我叫{name}。我的名字是什么？",
            f"{{你}}的名字叫{name}",
            name,
        )
    for age in range(21, 70):
        c.add(
            "memory",
            f"age {age}",
            str(age),
            "en",
            "wh",
            f"i am {age} years old. how old am i?;my age is {age}. what is my age?",
            f"{{you are}} {age} years old",
            str(age),
        )
        c.add(
            "memory",
            f"age {age}",
            str(age),
            "zh",
            "wh",
            f"我今年{age}岁。我几岁？;我的年龄是{age}。我多大？",
            f"{{你}}今年{age}岁",
            str(age),
        )
    for _, _, city, zh_city, *_ in tables.rows(tables.COUNTRIES):
        c.add(
            "memory",
            city,
            city,
            "en",
            "wh",
            f"i live in {city}. where do i live?;my home is in {city}. where is my home?",
            f"{{you live}} in {city}",
            city,
        )
        c.add(
            "memory",
            city,
            city,
            "zh",
            "wh",
            f"我住在{zh_city}。我住在哪里？;我的家在{zh_city}。我家在哪里？",
            f"{{你}}住在{zh_city}",
            zh_city,
        )


def _chat(c: _Collector) -> None:
    for family, table in (("talk", tables.TALK), ("feelings", tables.FEELINGS)):
        for index, (en, body, keys, zh, zh_body, zh_keys) in enumerate(tables.rows(table)):
            topic = f"{family} {index}"
            c.add(
                family,
                topic,
                "",
                "en",
                "talk",
                tuple(_mark(q) for q in en.split(";")),
                body,
                *(k.strip() for k in keys.split(",")),
            )
            c.add(
                family,
                topic,
                "",
                "zh",
                "talk",
                tuple(_mark_zh(q) for q in zh.split(";")),
                zh_body,
                *(k.strip() for k in zh_keys.split(",")),
            )
    for index, (en, body, keys, zh, zh_body, zh_keys) in enumerate(tables.rows(tables.ADVICE)):
        c.add(
            "advice",
            f"advice {index}",
            "",
            "en",
            "advice",
            tuple(
                f"{q}. {ask}"
                for q in en.split(";")
                for ask in ("what should i do?", "what do you advise?")
            ),
            body,
            *(k.strip() for k in keys.split(",")),
        )
        c.add(
            "advice",
            f"advice {index}",
            "",
            "zh",
            "advice",
            tuple(f"{q}，{ask}" for q in zh.split(";") for ask in ("怎么办？", "我该怎么做？")),
            zh_body,
            *(k.strip() for k in zh_keys.split(",")),
        )
    for index, (en, body, keys, zh, zh_body, zh_keys) in enumerate(tables.rows(tables.TASKS)):
        c.add(
            "tasks",
            f"task {index}",
            "",
            "en",
            "advice",
            tuple(
                ask.format(q)
                for q in en.split(";")
                for ask in ("how can i {}?", "i want to {}. what do you advise?")
            ),
            body,
            *(k.strip() for k in keys.split(",")),
        )
        c.add(
            "tasks",
            f"task {index}",
            "",
            "zh",
            "advice",
            tuple(
                ask.format(q)
                for q in zh.split(";")
                for ask in ("我怎样才能{}？", "我想{}，有什么建议？")
            ),
            zh_body,
            *(k.strip() for k in zh_keys.split(",")),
        )


_ASKING = ("how", "who", "what", "where", "when", "can", "are", "is")


def _mark(question: str) -> str:
    asks = question.split()[0] in _ASKING and not question.startswith(("what a ", "how lovely"))
    return question if question.endswith("!") else question + ("?" if asks else ".")


def _mark_zh(question: str) -> str:
    asks = question.endswith("吗") or any(
        w in question for w in ("什么", "谁", "哪里", "怎么", "几", "多大", "在干")
    )
    return question + ("？" if asks else "。")


def all_facts() -> list[Fact]:
    """Every fact of the world, in a fixed order."""
    collector = _Collector()
    for build in (
        _animals,
        _foods,
        _objects,
        _jobs,
        _countries,
        _words,
        _calendar,
        _numbers,
        _self,
        _chat,
    ):
        build(collector)
    return collector.facts
