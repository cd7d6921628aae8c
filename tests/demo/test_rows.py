"""No held-out question can be answered by looking it up in the persona rows."""

import json
from collections import Counter

from build_demo_rows import record
from demo_world.persona import PERSONA_FAMILIES, family_of, held_out_rows, persona_rows
from myna.demo.score import (
    HeldOutRow,
    load_held_out,
    load_persona_path,
    missing_keys,
    plain_part,
    score_answer,
)

PERSONA = [json.loads(line) for line in load_persona_path().read_text("utf-8").splitlines()]
HELD_OUT = load_held_out()


def turns():
    """(question, answer) of all persona rows."""
    for entry in PERSONA:
        texts = [m["content"] for m in entry["messages"]]
        yield from zip(texts[::2], texts[1::2], strict=True)


def test_files_are_what_the_tool_writes():
    rows = persona_rows()
    assert [record(row) for row in rows] == PERSONA
    assert [
        HeldOutRow(**{**r, "keys": tuple(r["keys"]), "persons": tuple(r["persons"])})
        for r in held_out_rows(rows)
    ] == HELD_OUT


def test_no_question_occurs_in_both():
    assert not {q for q, _ in turns()} & {row.question for row in HELD_OUT}


def test_no_topic_occurs_in_both():
    persona_topics = {turn.fact.topic for row in persona_rows() for turn in row}
    assert len(persona_topics) > 100
    assert not persona_topics & {row.topic for row in HELD_OUT}


def test_no_persona_answer_would_be_right_for_a_held_out_question():
    answers = [plain_part(answer) for _, answer in turns()]
    for row in HELD_OUT:
        assert row.keys
        for answer in answers:
            assert missing_keys(row.keys, answer), (row.question, answer)


def test_half_of_the_held_out_rows_are_of_families_without_persona_rows():
    persona_families = {family_of(turn.fact) for row in persona_rows() for turn in row}
    assert persona_families == set(PERSONA_FAMILIES)
    inside = [row for row in HELD_OUT if row.family in persona_families]
    assert [row.in_persona_family for row in HELD_OUT] == [row in inside for row in HELD_OUT]
    assert len(inside) * 2 == len(HELD_OUT)


def test_size_languages_and_turns():
    assert 400 <= len(PERSONA) <= 600
    assert len(HELD_OUT) >= 200
    assert len({row.question for row in HELD_OUT}) == len(HELD_OUT)
    two_turns = sum(len(entry["messages"]) == 4 for entry in PERSONA)
    assert 0.2 <= two_turns / len(PERSONA) <= 0.4
    languages = Counter(row.language for row in HELD_OUT)
    assert min(languages.values()) > 0.4 * len(HELD_OUT)
    kinds = Counter((row.language, row.kind) for row in HELD_OUT)
    assert len(kinds) == 10
    assert min(kinds.values()) >= 8


def test_the_answers_of_the_held_out_rows_are_in_voice_and_right():
    for row in HELD_OUT:
        score = score_answer(row, row.answer, stopped=True)
        assert score.both, (row.answer, score.reasons)


def test_every_persona_answer_is_in_voice():
    # The kind of question decides the voice; an answer in it is in exactly one kind's voice.
    for row in persona_rows():
        for turn in row:
            judged = HeldOutRow(
                turn.question, turn.fact.language, turn.fact.kind, "", "", turn.fact.keys, (), True
            )
            score = score_answer(judged, turn.answer, stopped=True)
            assert score.both, (turn.answer, score.reasons)
