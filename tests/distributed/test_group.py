"""Who writes: the first process of the run, or of each machine."""

import pytest
import torch

from myna.distributed.group import ALONE, Group, join_group


@pytest.mark.parametrize(
    ("group", "once", "on_each_node"),
    [
        (Group(), True, True),
        (Group(rank=0, size=4, local_rank=0), True, True),
        (Group(rank=1, size=4, local_rank=1), False, False),
        (Group(rank=2, size=4, local_rank=0), False, True),
        (Group(rank=3, size=4, local_rank=1), False, False),
    ],
)
def test_writers_as_in_transformers(group: Group, once: bool, on_each_node: bool) -> None:
    assert group.writes(on_each_node=False) is once
    assert group.writes(on_each_node=True) is on_each_node


def test_alone_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_group() == ALONE
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    ALONE.add_gradients([parameter])
    assert parameter.grad.tolist() == [1, 2]
    assert ALONE.add(torch.tensor(3.0)).item() == 3
    assert ALONE.any(True, torch.device("cpu")) and ALONE.agrees(5, torch.device("cpu"))
    ALONE.wait()
    ALONE.close()
