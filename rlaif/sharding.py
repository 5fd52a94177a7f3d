"""FSDP: weights spread over processes, for training loops of the project's own, and made whole again; ZeRO likewise.

TRL's trainers leave the spreading to accelerate. PPO's phases differ: its updates pass over equal shares in step, so
each layer's weights can be gathered when their turn comes, while in sampling and scoring the processes run as many
passes as their share of completions takes. For those, and for the sampling of RLOO and GRPO, the weights are gathered
once and spread again afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rlaif.models import inner
from rlaif.processes import asked, from_all, is_main, rank, shares_optimizer, spreads_weights, world_size
from rlaif.trunk import decoder_layers

log = logging.getLogger("rlaif")


_GATHERED: WeakSet[nn.Module] = WeakSet()
_SETTLED: WeakSet[nn.Module] = WeakSet()


def spread_weights(model: Any, short: bool = False) -> None:
    """With FSDP, spread a model over the processes, in place: each decoder layer, and what is outside the layers.

    Adapters stay whole in every process, and so do their gradients. Those of the model's own weights are spread like
    these, as the sum of what the processes contribute.

    Args:
        model: with or without adapters.
        short: gather the weights in bfloat16. Copies that autocast makes would outlive the layer that they are of.
    """
    if not spreads_weights():
        return
    core = inner(model)
    adapters = {value for name, value in model.named_parameters() if "lora_" in name}
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(core.device.type, (world_size(),)),
        "ignored_params": adapters,
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if short else MixedPrecisionPolicy(),
    }
    for layer in decoder_layers(model) or ():
        fully_shard(layer, reshard_after_forward=_frees_layers(), **settings)
    fully_shard(core, **settings)
    for unit in _units(core):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    if core.base_model is not core:
        # Where the backbone is called, and its states go to the head, no forward pass of the whole gathers what both
        # have outside the layers. The backward pass spreads it again.
        core.base_model.register_forward_pre_hook(lambda *_: core.unshard())
    _settle(core)
    parameters = [value for value in core.parameters() if isinstance(value, DTensor)]
    held, total = (sum(each) for each in zip(*((p.to_local().numel(), p.numel()) for p in parameters), strict=True))
    log.info("FSDP: this process holds %d of %d weights of %s", held, total, type(core).__name__)


@contextlib.contextmanager
def gathered(*models: Any) -> Iterator[None]:
    """Within the block, which is for passes without gradients, every process has all weights of these models.

    A block inside another of the same model does nothing.
    """
    mine = [model for model in models if inner(model) not in _GATHERED]
    for model in mine:
        # accelerate has spread those that TRL trains.
        if _units(model) and inner(model) not in _SETTLED:
            _settle(model)
    _GATHERED.update(map(inner, mine))
    for unit in (unit for model in mine for unit in _units(model)):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        _GATHERED.difference_update(map(inner, mine))
        for model in mine:
            for place, unit in enumerate(_units(model)):
                # The outermost stands first. What is outside the layers is used at both ends of a pass.
                unit.set_reshard_after_forward(place > 0 and _frees_layers(), recurse=False)
            _spread_again(model)


def _settle(model: Any) -> None:
    """The first pass settles which unit is the outermost, and may leave units gathered."""
    with torch.no_grad():
        model(input_ids=torch.arange(2, device=inner(model).device).unsqueeze(0), use_cache=False)
    _spread_again(model)
    _SETTLED.add(inner(model))


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _spread_again(model: nn.Module) -> None:
    for unit in _units(model):
        unit.reshard()


def _frees_layers() -> bool:
    """Whether layers give up what they gathered after a forward pass, or after the backward pass alone."""
    return "FSDP_RESHARD_AFTER_FORWARD" not in os.environ or asked("FSDP_RESHARD_AFTER_FORWARD")


def is_spread(value: Tensor) -> bool:
    """Whether each process has a part of a tensor."""
    return isinstance(value, DTensor)


def whole(value: Tensor) -> Tensor:
    """A tensor as it is; of one that is spread, all of it, which only the main process keeps (on the CPU)."""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if is_main() else full.new_empty(0)


def spread_like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor that every process has, spread as another of its shape is."""
    if not isinstance(other, DTensor) or value.shape != other.shape:
        return value
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def clip_gradients(parameters: Sequence[Tensor], limit: float) -> float:
    """Scale gradients such that their norm, that of all of them, is at most ``limit``; returns what it was."""
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


class SharedAdamW(torch.optim.AdamW):
    """AdamW whose state the processes share, as ZeRO's stage 1 does.

    Each keeps the state of some parameters, makes their steps and gives the others the result. All must have the same
    gradients; those of parameters that are another's go with the step.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, **settings)
        held = [0] * world_size()
        self.owners = [0] * len(self._all())
        # The largest first, each to the process that has least.
        for place in sorted(range(len(self.owners)), key=lambda place: -self._all()[place].numel()):
            self.owners[place] = held.index(min(held))
            held[self.owners[place]] += self._all()[place].numel()
        log.info(
            "ZeRO, by rlaif itself: this process holds the optimiser's state of %d of %d weights",
            held[rank()],
            sum(held),
        )

    def _all(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """The steps of what this process has, and then those of the others."""
        owned = list(zip(self._all(), self.owners, strict=True))
        for parameter, owner in owned:
            if owner != rank():
                parameter.grad = None
        super().step(closure)
        for parameter, owner in owned:
            torch.distributed.broadcast(parameter.data, src=owner)

    def whole_state(self) -> dict[int, dict[str, Tensor]]:
        """The state of all parameters, by their place; in the main process alone (on the CPU)."""
        places = self.state_dict()["state"]
        found: dict[int, dict[str, Tensor]] = {}
        # Without a gradient so far, a parameter has no state.
        for place, names in sorted(
            {place: names for part in from_all(_names(places)) for place, names in part}.items()
        ):
            owner, parameter = self.owners[place], self._all()[place]
            found[place] = {}
            for name, shape, dtype in names:
                value = places[place][name] if owner == rank() else torch.empty(shape, dtype=dtype)
                value = value.to(parameter.device, copy=True)
                torch.distributed.broadcast(value, src=owner)
                found[place][name] = value.cpu()
            if not is_main():
                found.clear()
        return found


def _names(state: dict[int, dict[str, Tensor]]) -> list[tuple[int, list[tuple[str, tuple[int, ...], torch.dtype]]]]:
    return [
        (place, [(name, tuple(value.shape), value.dtype) for name, value in of.items()]) for place, of in state.items()
    ]


def adamw(groups: Sequence[dict[str, Any]], **settings: Any) -> torch.optim.AdamW:
    """AdamW, in one kernel for many weights unless FSDP may have spread some of them.

    Where accelerate is configured for ZeRO, the processes share its state, without DeepSpeed's engine.
    """
    if not spreads_weights():
        settings["fused"] = True
    if shares_optimizer():
        return SharedAdamW(groups, **settings)
    return torch.optim.AdamW(groups, **settings)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's ``state_dict`` of whole tensors; of those that are spread, in the main process alone."""
    found = optimizer.state_dict()
    if isinstance(optimizer, SharedAdamW):
        return found | {"state": optimizer.whole_state()}
    state = {place: {name: whole(value) for name, value in of.items()} for place, of in found["state"].items()}
    return found | {"state": state}


def load_optimizer_state(optimizer: torch.optim.Optimizer, found: dict[str, Any]) -> None:
    """Put such a state back, which every process must have whole."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        place: {name: spread_like(value, parameters[place]) for name, value in of.items()}
        for place, of in found["state"].items()
        if not isinstance(optimizer, SharedAdamW) or optimizer.owners[place] == rank()
    }
    # The kernel is this run's choice, not that of the run that wrote the checkpoint.
    groups = [
        saved | {"fused": own["fused"]}
        for saved, own in zip(found["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict(found | {"state": state, "param_groups": groups})


def gather_weights(model: Any) -> None:
    """Replace weights that are spread over processes by whole ones, which only the main process keeps (on the CPU)."""
    _spread_again(model)
    found: dict[Any, nn.Parameter] = {}
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if isinstance(value.data, DTensor):
                if value not in found:  # Modules may share a weight.
                    found[value] = nn.Parameter(whole(value.data), value.requires_grad)
                setattr(module, name, found[value])
    if found:
        for parameter in model.parameters():
            parameter.data = parameter.data.cpu()
