"""Several processes on one task, as ``accelerate launch`` and ``torchrun`` start them: who does what, and waiting.

All processes must call :func:`from_main`, :func:`from_all`, :func:`spread`, :func:`add_up` and
:func:`copy_from_main` in the same order. With one process they do nothing but the work itself.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")

# The others wait while the main process asks a labeler or measures what was trained.
_PATIENCE = timedelta(hours=12)


def world_size() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def asked(variable: str) -> bool:
    """Whether accelerate's launcher set an environment variable of its own to yes."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def spreads_weights() -> bool:
    """Whether the processes share the weights (FSDP) instead of having all each."""
    return asked("ACCELERATE_USE_FSDP")


def zero_settings() -> dict[str, Any]:
    """ZeRO's settings in accelerate's configuration of DeepSpeed, in DeepSpeed's own words; none without."""
    if not asked("ACCELERATE_USE_DEEPSPEED"):
        return {}
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        return {"stage": 0, **json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {})}
    found: dict[str, Any] = {"stage": os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "none")}
    for what in ("optimizer", "param"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
        found[f"offload_{what}"] = {"device": device}
    return found


def shares_optimizer() -> bool:
    """Whether accelerate is configured for processes that share the optimiser's state (ZeRO)."""
    return world_size() > 1 and str(zero_settings().get("stage")) in ("1", "2")


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


def from_all(value: T) -> list[T]:
    """What every process gave, by their rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed

    _state()
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def share_of(items: Any) -> Any:
    """This process's items of a sequence or of a tensor's first dimension: every ``world_size()``-th."""
    return items[rank() :: world_size()]


def spread(work: Callable[[Sequence[S]], Sequence[T]], items: Sequence[S]) -> list[T]:
    """``work(items)``, one result an item, of which each process does its share."""
    found: list[Any] = [None] * len(items)
    for number, part in enumerate(from_all(list(work(share_of(items))))):
        found[number :: world_size()] = part
    return found


def add_up(tensors: Iterable[Any]) -> None:
    """Replace each tensor, in place, by its sum over all processes: the same bits in each of them."""
    if world_size() == 1:
        return
    import torch.distributed

    _state()
    for sum_up in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
        sum_up.wait()


def copy_from_main(tensors: Iterable[Any]) -> None:
    """Replace each tensor, in place, by the main process's."""
    if world_size() == 1:
        return
    import torch.distributed

    _state()
    for tensor in tensors:
        torch.distributed.broadcast(tensor, src=0)


@functools.cache
def _state() -> Any:
    """accelerate's view of the processes; making it joins them, until the interpreter ends."""
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    # Threads of a group that is only forgotten may abort a process that has done its work.
    atexit.register(_leave)
    return state


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
