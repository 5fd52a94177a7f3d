"""Several processes on one task, as ``accelerate launch`` and ``torchrun`` start them: who writes, and waiting."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def world_size() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Go on when every process has come this far."""
    if world_size() > 1:
        _state().wait_for_everyone()


def from_main(work: Callable[[], T]) -> T:
    """The result of ``work``, which only the main process does; an error in it is raised in every process."""
    if world_size() == 1:
        return work()
    import torch.distributed

    _state()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def _state() -> Any:
    """accelerate's view of the processes; making it joins them."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())
