"""``rlaif.train`` in processes between which FSDP or DeepSpeed spreads the work on CPUs.

accelerate does so on GPUs alone. Here it takes the CPUs for GPUs; what then happens to a model is what happens there.
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
# It refuses both where there is no GPU.
train._check_launcher = lambda config: None

launch("train", train.main, train.USAGE)
