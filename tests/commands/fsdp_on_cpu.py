"""``rlaif.train`` in processes between which FSDP spreads the model on CPUs.

accelerate does so on GPUs alone. Here it takes the CPUs for GPUs; what it then does to a model is torch's, as there.
"""

from __future__ import annotations

import accelerate.state
import torch

from rlaif import processes, train
from rlaif.cli import launch

State = accelerate.state.PartialState
State._prepare_backend = lambda self, *arguments: ("gloo", accelerate.state.DistributedType.MULTI_GPU)
State.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
processes._state = State
# It refuses FSDP where there is no GPU.
train._check_launcher = lambda config: None

launch("train", train.main, train.USAGE)
