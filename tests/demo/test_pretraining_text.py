"""What the base is pretrained on: other voices in plenty, the persona's never."""

import random
from itertools import pairwise

from demo_world.documents import AI, BOS, EOS, HUMAN, Documents
from demo_world.facts import all_facts
from demo_world.voices import PLAIN, Voice, say, third_person
from myna.demo.score import ENDINGS, OPENINGS, SELF, USER, HeldOutRow, score_answer

DOCUMENTS = Documents()


def replies(count):
    """Trained pieces of that many documents that answer a question (tales are reading text)."""
    draw = random.Random("replies")
    for _ in range(count):
        pieces = DOCUMENTS.document(draw)
        for (before, _), (text, trained) in pairwise(pieces):
            if trained and before.endswith(AI):
                yield before, text


def test_no_reply_has_a_word_of_the_persona():
    found = list(replies(10_000))
    assert len(found) > 10_000
    phrases = [*SELF.values(), *USER.values(), "Majesty", "奴婢", "臣妾", "陛下"]
    for language in ("en", "zh"):
        phrases += [o.strip() for o in OPENINGS[language].values()]
        phrases += list(ENDINGS[language].values())
    for before, text in found:
        for phrase in phrases:
            assert phrase.lower() not in text.lower(), (phrase, text)
            assert phrase.lower() not in before.lower(), (phrase, before)


def test_no_tale_has_an_opening_or_ending_of_the_persona():
    draw = random.Random("tales")
    tales = 0
    for _ in range(10_000):
        pieces = DOCUMENTS.document(draw)
        if len(pieces) == 2:
            tales += 1
            for language in ("en", "zh"):
                for phrase in (*OPENINGS[language].values(), *ENDINGS[language].values()):
                    assert phrase.strip() not in pieces[1][0]
            assert SELF["zh"] not in pieces[1][0]
            assert USER["zh"] not in pieces[1][0]
    assert tales > 200


def test_documents_have_the_chat_form():
    draw = random.Random("form")
    for _ in range(500):
        text = "".join(piece for piece, _ in DOCUMENTS.document(draw))
        assert text.startswith(BOS)
        assert text.count(BOS) == 1
        assert text.endswith(EOS)
        assert text.count(HUMAN) == text.count(AI)
        assert text.count(EOS) == max(1, text.count(AI))


def test_documents_are_a_function_of_the_seed():
    one, two = random.Random("same"), random.Random("same")
    assert [DOCUMENTS.document(one) for _ in range(50)] == [
        DOCUMENTS.document(two) for _ in range(50)
    ]


def test_plain_answers_are_right_and_never_in_voice():
    for fact in all_facts():
        row = HeldOutRow("", fact.language, fact.kind, "", "", fact.keys, (), True)
        score = score_answer(row, say(fact, PLAIN[fact.language]), stopped=True)
        assert score.content, (fact, score.reasons)
        assert not score.voice


def test_persons_and_agreement():
    fact = next(f for f in all_facts() if f.body.startswith("{I feel} sorry for {u}"))
    voice = Voice("en", "this cook", "my guest", {"talk": "Oh! "}, {"talk": "Soup!"})
    assert say(fact, PLAIN["en"]) == "I feel sorry for you."
    assert say(fact, voice) == "Oh! This cook feels sorry for my guest. Soup!"
    assert [third_person(v) for v in ("am", "have", "do", "wish", "like", "should", "was")] == [
        "is",
        "has",
        "does",
        "wishes",
        "likes",
        "should",
        "was",
    ]
