"""Learning rates against transformers' schedules; optimizer state without pickle."""

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from myna.training.optimizer import (
    Schedule,
    adamw,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")],
)
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_rates_equal_those_of_transformers(kind: str, theirs: str, warmup: int) -> None:
    total, peak = 23, 3e-4
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    ours = Schedule(kind, peak, warmup, total)  # type: ignore[arg-type]
    for step in range(1, total + 1):
        assert ours.learning_rate(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_state_put_back_gives_the_same_next_step() -> None:
    def model() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(3, 2)

    def step(net: nn.Linear, optimizer: torch.optim.AdamW) -> None:
        net(torch.ones(1, 3)).square().sum().backward()
        set_learning_rate(optimizer, 0.1)
        optimizer.step()
        optimizer.zero_grad()

    first = model()
    optimizer = adamw(first, weight_decay=0.01)
    step(first, optimizer)
    saved = {name: value.clone() for name, value in optimizer_tensors(optimizer, first).items()}
    weights = {name: value.clone() for name, value in first.state_dict().items()}
    step(first, optimizer)

    second = model()
    second.load_state_dict(weights)
    resumed = adamw(second, weight_decay=0.01)
    load_optimizer_tensors(resumed, second, saved)
    step(second, resumed)
    assert torch.equal(first.weight, second.weight)
    assert saved.keys() == {
        f"{name}.{key}" for name in ("weight", "bias") for key in ("step", "exp_avg", "exp_avg_sq")
    }
