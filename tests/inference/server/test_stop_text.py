"""Stop texts are found wherever pieces are cut, and nothing of them is ever sent."""

from hypothesis import given
from hypothesis import strategies as st

from myna.inference.server.stop_text import StopText

LETTERS = st.text("ab", max_size=12)


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool, list[str]]:
    watch = StopText(stops)
    sent = [watch.push(piece) for piece in pieces]
    if not watch.found:
        sent.append(watch.finish())
    return "".join(sent), watch.found, sent


@given(st.lists(LETTERS, max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4))
def test_the_text_before_the_first_stop_whatever_the_pieces(
    pieces: list[str], stops: list[str]
) -> None:
    text, found, sent = run(pieces, stops)
    whole = "".join(pieces)
    # Piece by piece, the first text that is complete ends it; of two at once, the earlier one.
    for size in range(len(pieces) + 1):
        so_far = "".join(pieces[:size])
        places = [so_far.find(stop) for stop in stops if stop in so_far]
        if places:
            assert found and text == so_far[: min(places)]
            break
    else:
        assert not found and text == whole
    for size in range(len(sent)):
        assert text.startswith("".join(sent[:size]))


def test_what_may_become_a_stop_text_is_held_back() -> None:
    watch = StopText(["\nUser:"])
    assert watch.push("Yes.\nUs") == "Yes."
    assert watch.push("e it.") == "\nUse it."
    assert watch.push("\nUser") == ""
    assert watch.finish() == "\nUser"
