"""PPO's value function: a linear head on hidden states, those of the policy or of an adapter of its own."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rlaif.policy import Packed, Policy, under
from rlaif.preference_model import add_beside, fits_beside
from rlaif.trunk import frozen_layers


class ValueHead(nn.Module):
    """A linear value on the last hidden state, zero at the start."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, H) -> (B, T)."""
        return self.linear(hidden.float()).squeeze(-1)


class ValueAdapter:
    """A LoRA adapter beside the policy's, on the same frozen base, that the value function alone reads and trains.

    It is shaped like the policy's and changes nothing at the start; or it starts as the PM's, where that is an adapter
    on the same base.

    Args:
        policy: with LoRA.
        preference_model: folder of the PM that the value function starts as; None: at zero.
    """

    NAME = "value"

    def __init__(self, policy: Policy, preference_model: Path | None = None) -> None:
        self.model = model = policy.model
        self.from_pm = preference_model is not None and fits_beside(preference_model, policy)
        if self.from_pm:
            assert preference_model is not None
            add_beside(policy, preference_model, self.NAME)
        else:
            model.add_adapter(self.NAME, copy.deepcopy(model.peft_config["default"]))
            model.eval()
        depth = len(frozen_layers(model))
        with self.active():
            self.named = {name: value for name, value in model.named_parameters() if value.requires_grad}
            self._shares_trunk = len(frozen_layers(model)) == depth
        for value in self.named.values():
            # As the policy's adapter: a step may be finer than a shorter float can hold.
            value.data = value.data.float()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Within the block the model has this adapter in place of the policy's, and no other gets gradients."""
        with under(self.model, self.NAME, trains=True):
            yield

    def fitting(self, batch: Packed) -> Packed:
        """The batch, without what the layers below the policy's adapter made of it if they are not those below this."""
        return batch if self._shares_trunk else replace(batch, trunk=None, prefix_trunk=None)

    def weights(self) -> dict[str, Tensor]:
        """What training changes of it."""
        return {name: value.detach() for name, value in self.named.items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        """Put such weights back."""
        with torch.no_grad():
            for name, value in self.named.items():
                value.copy_(weights[name])
