from myna.training.health import Divergence


def test_a_model_that_knows_its_rows_may_stumble() -> None:
    divergence = Divergence()
    assert not any(divergence.note(loss) for loss in [0.002] * 20 + [0.04] + [0.002] * 5)
    assert divergence.note(0.6) == (
        "the loss is 0.6, more than 10 times the 0.002 of the steps before; a lower learning rate "
        "may be needed"
    )


def test_a_jump_is_against_what_is_usual() -> None:
    divergence = Divergence()
    assert not any(divergence.note(loss) for loss in [3.0, 30.0, *[0.3] * 20, 2.9])
    assert divergence.note(3.1) is not None
    assert divergence.note(4.0) is None, "once in a while"
