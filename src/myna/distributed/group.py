"""The processes of a run, and the two things they do together: add gradients and wait.

Owns the process group that torchrun's environment describes; without it a run is a group of one.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes on this machine."""

    @property
    def is_first(self) -> bool:
        """Whether this process prints and reports."""
        return self.rank == 0

    def writes(self, *, on_each_node: bool) -> bool:
        """Whether this process writes checkpoints and the adapter.

        The first process of the run, or with `on_each_node` the first of every machine
        (`save_on_each_node` in transformers' TrainingArguments).
        """
        return self.local_rank == 0 if on_each_node else self.rank == 0

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over all processes, in one message."""
        if self.size == 1:
            return
        with_gradient = [parameter for parameter in parameters if parameter.requires_grad]
        flat = torch.cat(
            [
                torch.zeros_like(parameter).flatten()
                if parameter.grad is None
                else parameter.grad.flatten()
                for parameter in with_gradient
            ]
        )
        torch.distributed.all_reduce(flat)
        offset = 0
        for parameter in with_gradient:
            piece = flat[offset : offset + parameter.numel()].view_as(parameter)
            parameter.grad = piece.clone()
            offset += parameter.numel()

    def add(self, values: Tensor) -> Tensor:
        """Sum of `values` over all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether any process raised `flag`, so that all act alike."""
        if self.size == 1:
            return flag
        return bool(self.add(torch.tensor(float(flag), device=device)).item())

    def largest(self, values: Sequence[int], device: torch.device) -> list[int]:
        """The largest of every value over all processes."""
        if self.size == 1:
            return list(values)
        # float64 is exact for bytes; mps has none and no process group either.
        found = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return [int(value) for value in found.tolist()]

    def agrees(self, value: int, device: torch.device) -> bool:
        """Whether all processes have the same `value`."""
        if self.size == 1:
            return True
        extremes = torch.tensor([value, -value], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
        return bool(extremes[0] == -extremes[1])

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            torch.distributed.destroy_process_group()


ALONE = Group()
"""A run of one process."""


def join_group() -> Group:
    """The group that torchrun describes (RANK, WORLD_SIZE, LOCAL_RANK), or a group of one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Group()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    group = Group(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]), local_size)
    if torch.cuda.is_available():
        torch.cuda.set_device(group.local_rank)
        torch.distributed.init_process_group("nccl")
    else:
        torch.distributed.init_process_group("gloo")
    return group
