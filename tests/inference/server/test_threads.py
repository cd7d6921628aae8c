"""How many threads a server computes with."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from myna.inference.server.threads import leave_a_core


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class Timed(nn.Module):
    """A model whose step takes so many milliseconds with two threads and with three."""

    device = torch.device("cpu")

    def __init__(self, two: float, three: float) -> None:
        super().__init__()
        self.milliseconds = {2: two, 3: three}

    def forward(self, input_ids: torch.Tensor, **_: Any) -> None:
        time.sleep(self.milliseconds[torch.get_num_threads()] / 1000)


def test_a_thread_that_helps_little_is_left_to_others() -> None:
    told = leave_a_core(Timed(two=44, three=40))
    assert told is not None and told.startswith("computing with 2 of 3 threads: a step of 64 ")
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("two", "three"), [(90, 30), (130, 120)], ids=["it is worth having", "the step is long"]
)
def test_a_thread_that_helps_computes(two: float, three: float) -> None:
    assert leave_a_core(Timed(two, three)) is None
    assert torch.get_num_threads() == 3


def test_a_single_thread_is_kept() -> None:
    torch.set_num_threads(1)
    assert leave_a_core(Timed(1, 1)) is None
    assert torch.get_num_threads() == 1
