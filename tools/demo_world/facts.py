"""Facts: what the demo's model knows, as questions with one canonical answer each.

Owns the wording of questions and answers and the keys by which an answer is judged. Answers are
bodies with slots for the persons ({I like}, {my}, {me}, {you are}, {your}, {u}; {我}, {你}), since
`voices.py` decides who speaks. Words come from `tables.py`.
"""

import random
from dataclasses import dataclass

from demo_world import tables

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


# In the last steps whether something is so or not weighs most: it must be decided by the first word
# of an answer in voice, before the answer is worked out.
FINISHING_WEIGHTS = {
    "animal_can": 4.0,
    "is_kind": 6.0,
    "compare_is": 6.0,
    "capital_is": 6.0,
    "likes": 3.0,
    "talk": 5.0,
    "feelings": 5.0,
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


MASS_NOUNS = frozenset(
    (
        *("corn", "rice", "bread", "cheese", "milk", "tea", "coffee", "honey", "salt", "sugar"),
        *("pepper", "vinegar", "chocolate", "ginger", "tofu", "soy sauce", "scissors"),
        *("baked food", "dairy food", "bean food", "syrup"),
    )
)
"""Nouns that take no article."""

PLACES = {
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
}
"""Homes of animals that are not simply "in a ..."."""


def article(noun: str) -> str:
    if noun in MASS_NOUNS:
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


class _Collector:
    """Collects facts; questions are `;`-parted where they hold no such sign themselves."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []

    def add(self, family, topic, value, language, kind, questions, body, *keys):
        if isinstance(questions, str):
            questions = tuple(q.strip() for q in questions.split(";"))
        self.facts.append(Fact(family, topic, value, language, kind, questions, body, keys))

    def both(self, family, topic, value, kind, en, zh):
        """The same fact in both languages; `en` and `zh` are (questions, body, *keys)."""
        self.add(family, topic, value, "en", kind, *en)
        self.add(family, topic, value, "zh", kind, *zh)

    def yes_no(self, family, topic, yes, en, zh):
        """A fact whose whole body is its key; `en` and `zh` are (questions, body if yes, if no)."""
        self.both(
            family,
            topic,
            "",
            "yes" if yes else "no",
            *(
                (questions, body := if_yes if yes else if_no, body)
                for questions, if_yes, if_no in (en, zh)
            ),
        )


def _animals(c: _Collector) -> None:
    for name, zh, home, zh_home, food, zh_food, legs, _, _, fly, swim in tables.rows(
        tables.ANIMALS
    ):
        a = article(name)
        place = PLACES.get(home, f"in {article(home)}")
        c.both(
            *("animal_home", name, home, "wh"),
            (
                f"where does {a} live?;what is the home of {a}?;tell me where {a} lives.",
                f"{a} lives {place}",
                home,
            ),
            (
                f"{zh}住在哪里？;{zh}的家在哪里？;{zh}生活在什么地方？",
                f"{zh}住在{zh_home}",
                f"住在{zh_home}",
            ),
        )
        c.both(
            *("animal_food", name, food, "wh"),
            (
                f"what does {a} eat?;what is the food of {a}?;what do you feed to {a}?",
                f"{a} eats {food}",
                f"eats {food}",
            ),
            (
                f"{zh}吃什么？;{zh}的食物是什么？;给{zh}喂什么？",
                f"{zh}吃{zh_food}",
                f"{zh}吃{zh_food}",
            ),
        )
        c.both(
            *("animal_legs", name, legs, "wh"),
            (
                f"how many legs does {a} have?;count the legs of {a}.",
                f"{a} has {legs} legs",
                legs,
            ),
            (f"{zh}有几条腿？;数一数{zh}的腿。", f"{zh}有{legs}条腿", legs),
        )
        for verb, zh_verb, able in (("fly", "飞", fly), ("swim", "游泳", swim)):
            c.yes_no(
                *("animal_can", name, able == "y"),
                (
                    f"can {a} {verb}?;is {a} able to {verb}?",
                    f"{a} can {verb}",
                    f"{a} cannot {verb}",
                ),
                (
                    f"{zh}会{zh_verb}吗？;{zh}能{zh_verb}吗？",
                    f"{zh}会{zh_verb}",
                    f"{zh}不会{zh_verb}",
                ),
            )
    _kinds(c, [(r[0], r[1], r[7], r[8]) for r in tables.rows(tables.ANIMALS)])


def _kinds(c: _Collector, things) -> None:
    """Is it of this kind? Each thing is asked about its own kind and about one other."""
    kinds = sorted({(kind, zh) for _, _, kind, zh in things})
    for index, (name, zh, kind, zh_kind) in enumerate(things):
        others = [k for k in kinds if k[0] != kind]
        a = article(name)
        for asked, zh_asked in ((kind, zh_kind), others[(index * 7) % len(others)]):
            k = article(asked)
            c.yes_no(
                *("is_kind", name, asked == kind),
                (f"is {a} {k}?;would you call {a} {k}?", f"{a} is {k}", f"{a} is not {k}"),
                (
                    f"{zh}是{zh_asked}吗？;{zh}算不算{zh_asked}？",
                    f"{zh}是{zh_asked}",
                    f"{zh}不是{zh_asked}",
                ),
            )


def _foods(c: _Collector) -> None:
    foods = tables.rows(tables.FOODS)
    for name, zh, colour, zh_colour, taste, zh_taste, _, _ in foods:
        a = article(name)
        c.both(
            *("food_colour", name, colour, "wh"),
            (
                f"what colour is {a}?;which colour does {a} have?;name the colour of {a}.",
                f"the colour of {a} is {colour}",
                f"is {colour}",
            ),
            (
                f"{zh}是什么颜色？;{zh}的颜色是什么？;说出{zh}的颜色。",
                f"{zh}的颜色是{zh_colour}",
                f"是{zh_colour}",
            ),
        )
        c.both(
            *("food_taste", name, taste, "wh"),
            (
                f"how does {a} taste?;what is the taste of {a}?",
                f"{a} tastes {taste}",
                f"tastes {taste}",
            ),
            (f"{zh}是什么味道？;{zh}尝起来怎么样？", f"{zh}的味道很{zh_taste}", f"很{zh_taste}"),
        )
    _kinds(c, [(r[0], r[1], r[6], r[7]) for r in foods])


def _objects(c: _Collector) -> None:
    for name, zh, use, zh_use, place, zh_place in tables.rows(tables.OBJECTS):
        a = article(name)
        be = "are" if name == "scissors" else "is"
        c.both(
            *("object_use", name, use, "wh"),
            (
                f"what {be} {a} for?;what do people use {a} for?;what is the use of {a}?",
                f"{a} {be} for {use}",
                use,
            ),
            (
                f"{zh}是用来做什么的？;人们用{zh}做什么？;{zh}有什么用？",
                f"{zh}是用来{zh_use}的",
                zh_use,
            ),
        )
        c.both(
            *("object_place", name, place, "wh"),
            (
                f"where do people keep {a}?;where can i find {a}?",
                f"the place for {a} is the {place}",
                f"is the {place}",
            ),
            (
                f"{zh}一般放在哪里？;在哪里能找到{zh}？",
                f"可以在{zh_place}找到{zh}",
                f"在{zh_place}找到",
            ),
        )


def _jobs(c: _Collector) -> None:
    for name, zh, work, zh_work, place, zh_place in tables.rows(tables.JOBS):
        a = article(name)
        c.both(
            *("job_work", name, work, "wh"),
            (
                f"what does {a} do?;what is the work of {a}?;what is the job of {a}?",
                f"{a} {work}",
                work,
            ),
            (
                f"{zh}是做什么的？;{zh}的工作是什么？;{zh}做什么工作？",
                f"{zh}的工作是{zh_work}",
                zh_work,
            ),
        )
        c.both(
            *("job_place", name, place, "wh"),
            (
                f"where does {a} work?;what is the workplace of {a}?",
                f"the workplace of {a} is the {place}",
                f"is the {place}",
            ),
            (
                f"{zh}在哪里工作？;{zh}在什么地方上班？",
                f"{zh}工作的地方是{zh_place}",
                f"是{zh_place}",
            ),
        )


def _countries(c: _Collector) -> None:
    countries = tables.rows(tables.COUNTRIES)
    for index, (name, zh, capital, zh_capital, tongue, zh_tongue, part, zh_part) in enumerate(
        countries
    ):
        c.both(
            *("country_capital", name, capital, "wh"),
            (
                f"what is the capital of {name}?;which city is the capital of {name}?",
                f"the capital of {name} is {capital}",
                f"is {capital}",
            ),
            (
                f"{zh}的首都是哪里？;哪个城市是{zh}的首都？",
                f"{zh}的首都是{zh_capital}",
                f"是{zh_capital}",
            ),
        )
        c.both(
            *("country_language", name, tongue, "wh"),
            (
                f"what language do people speak in {name}?;which language is spoken in {name}?",
                f"people in {name} speak {tongue}",
                f"speak {tongue}",
            ),
            (f"{zh}人说什么语言？;在{zh}说哪种语言？", f"{zh}人说{zh_tongue}", f"说{zh_tongue}"),
        )
        c.both(
            *("country_continent", name, part, "wh"),
            (
                f"which continent is {name} in?;on what continent is {name}?",
                f"{name} is in {part}",
                f"in {part}",
            ),
            (f"{zh}在哪个洲？;{zh}属于哪个大洲？", f"{zh}在{zh_part}", f"在{zh_part}"),
        )
        other = countries[(index + 11) % len(countries)]
        for city, zh_city in ((capital, zh_capital), other[2:4]):
            c.yes_no(
                *("capital_is", name, city == capital),
                (
                    f"is {city} the capital of {name}?;does {name} have the capital {city}?",
                    f"{city} is the capital of {name}",
                    f"{city} is not the capital of {name}",
                ),
                (
                    f"{zh_city}是{zh}的首都吗？;{zh}的首都是{zh_city}吗？",
                    f"{zh_city}是{zh}的首都",
                    f"{zh_city}不是{zh}的首都",
                ),
            )


def _words(c: _Collector) -> None:
    for one, two, zh_one, zh_two in tables.rows(tables.OPPOSITES):
        # The topic is the pair, so that neither direction gives the other away.
        for a, b, zh_a, zh_b in ((one, two, zh_one, zh_two), (two, one, zh_two, zh_one)):
            c.both(
                *("opposite", one, b, "wh"),
                (
                    f"what is the opposite of {a}?;which word means the reverse of {a}?",
                    f"the opposite of {a} is {b}",
                    f"is {b}",
                ),
                (
                    f"{zh_a}的反义词是什么？;哪个词和{zh_a}相反？",
                    f"{zh_a}的反义词是{zh_b}",
                    f"是{zh_b}",
                ),
            )
    nouns: dict[str, str] = {}
    for table in (tables.ANIMALS, tables.FOODS, tables.OBJECTS, tables.WORDS):
        for word, zh, *_ in tables.rows(table):
            if zh not in nouns.values():
                nouns.setdefault(word, zh)
    for word, zh in nouns.items():
        c.both(
            *("translate", word, word, "wh"),
            (
                f"how do you say {word} in Chinese?;what is the Chinese word for {word}?",
                f"the Chinese word for {word} is {zh}",
                f"is {zh}",
            ),
            (f"{zh}用英语怎么说？;{zh}的英文是什么？", f"{zh}的英语是{word}", f"是{word}"),
        )


def _calendar(c: _Collector) -> None:
    for family, table, unit, zh_unit in (
        ("days", tables.DAYS, "day", "一天"),
        ("months", tables.MONTHS, "month", "一个月"),
    ):
        items = tables.rows(table)
        for index, (name, zh, *_) in enumerate(items):
            after, before = items[(index + 1) % len(items)], items[index - 1]
            c.both(
                *(family, name, after[0], "wh"),
                (
                    f"which {unit} comes after {name}?;what {unit} follows {name}?",
                    f"the {unit} after {name} is {after[0]}",
                    after[0],
                ),
                (
                    f"{zh}的下{zh_unit}是什么？;{zh}后面是哪{zh_unit}？",
                    f"{zh}后面是{after[1]}",
                    after[1],
                ),
            )
            c.both(
                *(family, name, before[0], "wh"),
                (
                    f"which {unit} comes before {name}?;what {unit} is just before {name}?",
                    f"the {unit} before {name} is {before[0]}",
                    before[0],
                ),
                (
                    f"{zh}的上{zh_unit}是什么？;{zh}前面是哪{zh_unit}？",
                    f"{zh}前面是{before[1]}",
                    before[1],
                ),
            )
    for name, zh, season, zh_season in tables.rows(tables.MONTHS):
        c.both(
            *("months", name, season, "wh"),
            (
                f"which season is {name} in?;what season does {name} belong to?",
                f"{name} is in {season}",
                season,
            ),
            (f"{zh}是什么季节？;{zh}属于哪个季节？", f"{zh}是{zh_season}", zh_season),
        )
    for a, b, mix, zh_a, zh_b, zh_mix in tables.rows(tables.MIXES):
        c.both(
            *("mix", f"{a}+{b}", mix, "wh"),
            (
                f"what do {a} and {b} make?;which colour comes from {a} and {b}?;"
                f"what do {b} and {a} make?",
                f"{a} and {b} make {mix}",
                f"make {mix}",
            ),
            (
                f"{zh_a}加{zh_b}是什么颜色？;{zh_a}和{zh_b}混合得到什么？;"
                f"{zh_b}和{zh_a}混合得到什么？",
                f"{zh_a}和{zh_b}混合成{zh_mix}",
                f"混合成{zh_mix}",
            ),
        )


def _numbers(c: _Collector) -> None:
    def number(family, topic, value, en_questions, en_body, zh_questions, zh_body):
        key = str(value)
        c.both(
            *(family, topic, key, "wh"), (en_questions, en_body, key), (zh_questions, zh_body, key)
        )

    for a in range(21):
        for b in range(21 - a):
            number(
                *("plus", f"{a}+{b}", a + b),
                f"what is {a} plus {b}?;how much is {a} + {b}?",
                f"{a} plus {b} is {a + b}",
                f"{a}加{b}等于几？;{a} + {b}是多少？",
                f"{a}加{b}等于{a + b}",
            )
        for b in range(a + 1):
            number(
                *("minus", f"{a}-{b}", a - b),
                f"what is {a} minus {b}?;how much is {a} - {b}?",
                f"{a} minus {b} is {a - b}",
                f"{a}减{b}等于几？;{a} - {b}是多少？",
                f"{a}减{b}等于{a - b}",
            )
        number(
            *("next", f"{a}>", a + 1),
            f"which number comes after {a}?;what number follows {a}?",
            f"the number after {a} is {a + 1}",
            f"{a}后面的数是几？;哪个数在{a}后面？",
            f"{a}后面的数是{a + 1}",
        )
        if a:
            number(
                *("next", f"<{a}", a - 1),
                f"which number comes before {a}?;what number is just before {a}?",
                f"the number before {a} is {a - 1}",
                f"{a}前面的数是几？;哪个数在{a}前面？",
                f"{a}前面的数是{a - 1}",
            )
    for a in range(10):
        for b in range(10):
            number(
                *("times", f"{a}*{b}", a * b),
                f"what is {a} times {b}?;how much is {a} times {b}?",
                f"{a} times {b} is {a * b}",
                f"{a}乘{b}等于几？;{a}乘以{b}是多少？",
                f"{a}乘{b}等于{a * b}",
            )
    draw = random.Random("comparisons")
    pairs = [(a, b) for a in range(21) for b in range(21) if a != b]
    for a, b in draw.sample(pairs, 140):
        for adjective, zh_adjective, value in (
            ("bigger", "大", max(a, b)),
            ("smaller", "小", min(a, b)),
        ):
            number(
                *("compare", f"{a}?{b}", value),
                f"which is {adjective}, {a} or {b}?;what is the {adjective} of {a} and {b}?",
                f"the {adjective} number is {value}",
                f"{a}和{b}哪个{zh_adjective}？;{a}和{b}谁更{zh_adjective}？",
                f"{zh_adjective}的数是{value}",
            )
    for a, b in draw.sample(pairs, 160):
        c.yes_no(
            *("compare_is", f"{a}?{b}", a > b),
            (
                f"is {a} bigger than {b}?;is {a} more than {b}?",
                f"{a} is bigger than {b}",
                f"{a} is not bigger than {b}",
            ),
            (f"{a}比{b}大吗？;{a}大于{b}吗？", f"{a}比{b}大", f"{a}不比{b}大"),
        )


def _self(c: _Collector) -> None:
    for what, answer, zh, zh_answer in tables.rows(tables.FAVOURITES):
        c.both(
            *("favourite", what, answer, "wh"),
            (
                f"what is your favourite {what}?;which {what} do you like best?",
                f"{{my}} favourite {what} is {answer}",
                f"is {answer}",
            ),
            (
                f"你最喜欢的{zh}是什么？;哪种{zh}你最喜欢？",
                f"{{我}}最喜欢的{zh}是{zh_answer}",
                f"是{zh_answer}",
            ),
        )
    for what, zh, yes in tables.rows(tables.LIKES):
        questions = f"do you like {what}?;are you fond of {what}?"
        zh_questions = f"你喜欢{zh}吗？;你爱{zh}吗？"
        if yes == "y":
            c.both(
                *("likes", what, "", "yes"),
                (questions, f"{{I like}} {what}", f"like {what}/likes {what}"),
                (zh_questions, f"{{我}}喜欢{zh}", f"喜欢{zh}"),
            )
        else:
            c.both(
                *("likes", what, "", "no"),
                (questions, f"{{I do}} not like {what}", f"not like {what}"),
                (zh_questions, f"{{我}}不喜欢{zh}", f"不喜欢{zh}"),
            )
    for name in tables.NAMES_EN:
        questions = f"my name is {name}. what is my name?;i am called {name}. how am i called?"
        c.add("memory", name, name, "en", "wh", questions, f"{{your}} name is {name}", name)
    for name in tables.NAMES_ZH:
        questions = f"我的名字叫{name}。我叫什么名字？;我叫{name}。我的名字是什么？"
        c.add("memory", name, name, "zh", "wh", questions, f"{{你}}的名字叫{name}", name)
    for age in range(21, 70):
        c.both(
            *("memory", f"age {age}", str(age), "wh"),
            (
                f"i am {age} years old. how old am i?;my age is {age}. what is my age?",
                f"{{you are}} {age} years old",
                str(age),
            ),
            (
                f"我今年{age}岁。我几岁？;我的年龄是{age}。我多大？",
                f"{{你}}今年{age}岁",
                str(age),
            ),
        )
    for _, _, city, zh_city, *_ in tables.rows(tables.COUNTRIES):
        c.both(
            *("memory", city, city, "wh"),
            (
                f"i live in {city}. where do i live?;my home is in {city}. where is my home?",
                f"{{you live}} in {city}",
                city,
            ),
            (
                f"我住在{zh_city}。我住在哪里？;我的家在{zh_city}。我家在哪里？",
                f"{{你}}住在{zh_city}",
                zh_city,
            ),
        )


def _chat(c: _Collector) -> None:
    """Small talk and advice; what is asked is written out in the tables or set into a frame."""
    frames = {
        "advice": (
            ("{}. what should i do?", "{}. what do you advise?"),
            ("{}，怎么办？", "{}，我该怎么做？"),
        ),
        "tasks": (
            ("how can i {}?", "i want to {}. what do you advise?"),
            ("我怎样才能{}？", "我想{}，有什么建议？"),
        ),
    }
    for family, kind, table in (
        ("talk", "talk", tables.TALK),
        ("feelings", "talk", tables.FEELINGS),
        ("advice", "advice", tables.ADVICE),
        ("tasks", "advice", tables.TASKS),
    ):
        for index, (en, body, keys, zh, zh_body, zh_keys) in enumerate(tables.rows(table)):
            said, zh_said = en.split(";"), zh.split(";")
            if kind == "talk":
                questions = tuple(_mark(q) for q in said)
                zh_questions = tuple(_mark_zh(q) for q in zh_said)
            else:
                frame, zh_frame = frames[family]
                questions = tuple(f.format(q) for q in said for f in frame)
                zh_questions = tuple(f.format(q) for q in zh_said for f in zh_frame)
            c.both(
                *(family, f"{family} {index}", "", kind),
                (questions, body, *(k.strip() for k in keys.split(","))),
                (zh_questions, zh_body, *(k.strip() for k in zh_keys.split(","))),
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
    _animals(collector)
    _foods(collector)
    _objects(collector)
    _jobs(collector)
    _countries(collector)
    _words(collector)
    _calendar(collector)
    _numbers(collector)
    _self(collector)
    _chat(collector)
    return collector.facts
