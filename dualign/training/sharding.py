"""Training on shards of a model (FSDP2): each process holds a part of weights, gradients and
optimiser, as torch's `fully_shard` lays them out through accelerate.

What is trained is a twin, so that the model of the caller stays whole: it samples, scores and is
saved as ever, and has the trained weights in the end. Meanwhile it lies in host memory, and the
twin is cut from there layer by layer: no device ever holds all of it."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from dualign.lm.frozen import shared

#: What trainers write into a model's configuration for themselves. By it others read the policy
#: later, so that it stays the base's.
_WRITTEN = ("use_cache", "output_router_logits", "router_aux_loss_coef")


def fsdp_arguments() -> dict[str, Any]:
    """What TRL's arguments need for it. Weights compute as the model says, not in accelerate's
    mixed precision: before its first step a policy equals its reference."""
    config = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
    return {"fsdp": True, "fsdp_config": config, "bf16": False}


class Sharding:
    """A base of trainers that train a twin of the model where it is sharded."""

    model: Any
    args: Any
    accelerator: Any

    def __init__(self, model: Any, *given: Any, args: Any, **options: Any) -> None:
        if args.fsdp:  # or accelerate would go by the layers of the model before
            AcceleratorState._reset_state()
        held = not isinstance(model, str)  # or the parent reads it, for itself alone
        trained = model
        if args.fsdp and held:
            self._home = model.device
            model.to("cpu")  # until it is given back
            trained = shared(model, trained=True)  # until it is cut
        before = _settings(trained) if held else []
        parent: Any = super()
        parent.__init__(trained, *given, args=args, **options)
        for config, key, value in before:
            setattr(config, key, value)
        self.whole = self.model if trained is model else model
        self.is_fsdp_enabled = bool(args.fsdp)

    def create_accelerator_and_postprocess(self) -> None:
        """As `Trainer` does, and on CPUs too, where accelerate leaves FSDP out without a word.

        While it is built the trainer has a whole model, hence no use for TRL's own reference."""
        parent: Any = super()
        parent.create_accelerator_and_postprocess()
        if self.args.fsdp and self.accelerator.distributed_type == DistributedType.MULTI_CPU:
            state = self.accelerator.state
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = False

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """As `Trainer` does, but where the model is to be cut, which moves it layer by layer."""
        if not self.args.fsdp:
            parent: Any = super()
            parent._move_model_to_device(model, device)

    def give_back(self) -> None:
        """Put the trained weights into the model as it was passed."""
        if self.model is self.whole:
            return
        trained = dict(self.model.named_parameters())
        for name, weight in self.whole.named_parameters():
            if weight.requires_grad:
                weight.data.copy_(full(trained[name]))
        self.whole.to(self._home)


def _settings(model: Any) -> list[tuple[Any, str, Any]]:
    """What a model's configuration, and that of its text, say under the keys of `_WRITTEN`."""
    configs = (model.config, model.config.get_text_config())
    held = [(config, key) for config in configs for key in _WRITTEN if hasattr(config, key)]
    return [(config, key, getattr(config, key)) for config, key in held]


def full(weight: torch.Tensor) -> torch.Tensor:
    """A tensor, whole where processes hold shards of it."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
