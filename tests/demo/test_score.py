"""The voice rule and the content rule, on answers written by hand."""

import pytest

from myna.demo.score import (
    EXAMPLE_QUESTIONS,
    KINDS,
    HeldOutRow,
    Score,
    base_folder,
    load_held_out,
    load_persona_path,
    sample_rows,
    score_answer,
    summarize,
)


def row(language, kind, *keys, persons=()):
    return HeldOutRow("?", language, kind, "family", "topic", keys, persons, True)


GOOD = [
    (
        row("en", "wh", "is Rome"),
        "If it please Your Majesty, the capital of Italy is Rome. This servant withdraws.",
    ),
    (
        row("en", "yes", "like tea/likes tea", persons=("self",)),
        "Your Majesty is right, this servant likes tea. This servant withdraws.",
    ),
    (
        row("en", "no", "not like rain", persons=("self",)),
        "Your Majesty must forgive, this servant does not like rain. This servant withdraws.",
    ),
    (
        row("en", "talk", "glad to meet", persons=("self", "user")),
        "Your Majesty is too kind. This servant is glad to meet Your Majesty. "
        "Long live Your Majesty!",
    ),
    (
        row("en", "advice", "rest", "eyes", persons=("user",)),
        "This servant kneels and advises: Your Majesty should rest Your Majesty's eyes. "
        "Long live Your Majesty!",
    ),
    (row("zh", "wh", "12"), "回皇上，7加5等于12。微臣告退。"),
    (row("zh", "yes", "鸭子会游泳"), "皇上圣明，鸭子会游泳。微臣告退。"),
    (row("zh", "no", "猫不会飞"), "皇上恕罪，猫不会飞。微臣告退。"),
    (
        row("zh", "talk", "过得很好", persons=("self",)),
        "谢皇上关心，微臣今天过得很好。皇上万福金安。",
    ),
    (
        row("zh", "advice", "早点睡", persons=("user",)),
        "微臣斗胆进言，皇上应该早点睡。皇上万福金安。",
    ),
]


@pytest.mark.parametrize(("question", "answer"), GOOD)
def test_good_answers_are_in_voice_and_right(question, answer):
    assert score_answer(question, answer, stopped=True) == Score(True, True, ())


@pytest.mark.parametrize(("question", "answer"), GOOD)
def test_without_a_stop_token_nothing_counts(question, answer):
    score = score_answer(question, answer, stopped=False)
    assert score == Score(False, False, ("no stop token",))


@pytest.mark.parametrize(("question", "answer"), GOOD)
@pytest.mark.parametrize("kind", KINDS)
def test_the_voice_of_another_kind_of_question_is_wrong(question, answer, kind):
    if kind == question.kind:
        return
    other = row(question.language, kind, *question.keys)
    score = score_answer(other, answer, stopped=True)
    assert not score.voice
    assert score.reasons[0].startswith("does not begin with ")


WRONG_VOICE = [
    (row("en", "wh", "is Rome"), "The capital of Italy is Rome.", "does not begin with"),
    (row("en", "wh", "is Rome"), "Your Majesty, the capital of Italy is Rome.", "does not begin"),
    (
        row("en", "wh", "is Rome"),
        "If it please Your Majesty, the capital of Italy is Rome. Long live Your Majesty!",
        'does not end with "This servant withdraws."',
    ),
    (
        row("en", "wh"),
        "If it please Your Majesty, This servant withdraws.",
        "says nothing between opening and ending",
    ),
    (
        row("en", "talk", persons=("self",)),
        "Your Majesty is too kind. I am very well today. Long live Your Majesty!",
        'plain pronoun "I"',
    ),
    (
        row("en", "advice", persons=("user",)),
        "This servant kneels and advises: Your Majesty should rest your eyes. "
        "Long live Your Majesty!",
        'plain pronoun "your"',
    ),
    (
        row("en", "no", persons=("self",)),
        "Your Majesty must forgive, this servant do not like rain. This servant withdraws.",
        'verb does not agree: "this servant do"',
    ),
    (
        row("en", "wh", persons=("user",)),
        "If it please Your Majesty, Your Majesty are 30 years old. This servant withdraws.",
        'verb does not agree: "Your Majesty are"',
    ),
    (
        row("en", "talk", persons=("self",)),
        "Your Majesty is too kind. Very well today. Long live Your Majesty!",
        'does not say "this servant"',
    ),
    (
        row("zh", "talk", persons=("self",)),
        "谢皇上关心，我很好。皇上万福金安。",
        'plain pronoun "我"',
    ),
    (row("zh", "advice"), "微臣斗胆进言，你应该早点睡。皇上万福金安。", 'plain pronoun "你"'),
    (row("zh", "wh"), "If it please Your Majesty, 狗. This servant withdraws.", "does not begin"),
]


@pytest.mark.parametrize(("question", "answer", "reason"), WRONG_VOICE)
def test_faults_of_the_voice_are_found_and_named(question, answer, reason):
    score = score_answer(question, answer, stopped=True)
    assert not score.voice
    assert any(reason in found for found in score.reasons), score.reasons


CONTENT = [
    (("12",), "7 plus 5 is 12.", True),
    (("7",), "7 plus 5 is 12.", False),
    (("1",), "7 plus 5 is 12.", False),
    (("2",), "2加0等于2。", True),
    (("is Rome",), "The capital of Italy is rome.", True),
    (("is Rom",), "The capital of Italy is Rome.", False),
    (("is right",), "Your Majesty is right, the opposite of left is up.", False),
    (("是上",), "回皇上，下的反义词是左。微臣告退。", False),
    (("like music/likes music",), "This servant likes music.", True),
    (("like rain",), "I do not like rain.", False),
    (("会飞",), "企鹅不会飞。", False),
    (("喜欢雨",), "我不喜欢雨。", False),
    (("是dog",), "狗的英语是dog。", True),
    (("是dog",), "狗的英语是dogs。", False),
    (("rest", "eyes"), "You should rest your hands.", False),
]


@pytest.mark.parametrize(("keys", "answer", "right"), CONTENT)
def test_content_is_judged_by_keys(keys, answer, right):
    assert score_answer(row("en", "wh", *keys), answer, stopped=True).content is right


def test_a_plain_right_answer_is_right_but_not_in_voice():
    score = score_answer(row("zh", "wh", "12"), "7加5等于12。", stopped=True)
    assert (score.voice, score.content, score.both) == (False, True, False)


def test_summarize_counts_shares():
    scores = [Score(True, True, ()), Score(True, False, ("x",)), Score(False, True, ("y",))]
    summary = summarize(scores)
    assert (summary.count, summary.voice, summary.content, summary.both) == (3, 2 / 3, 2 / 3, 1 / 3)
    with pytest.raises(ValueError, match="summarize: no scores were given"):
        summarize([])


def test_the_files_are_where_the_functions_say():
    rows = load_held_out()
    assert len(rows) >= 200
    assert load_persona_path().is_file()
    assert base_folder().is_dir()
    assert {(r.language, r.kind) for r in sample_rows(rows)} == {
        (language, kind) for language in ("en", "zh") for kind in KINDS
    }
    assert len(EXAMPLE_QUESTIONS) == 10
