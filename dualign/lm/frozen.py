"""Weights that no training changes, held once in a process, however many models compute with them.

Policies of LoRA are adapters on one base, and so are scorers that were trained so. Each is a model
of its own, with its own modules, adapters, configuration and hooks, over weights whose storage is
shared: it computes the same bytes as one that has read the base for itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from transformers import PreTrainedModel

from dualign.core.artifacts import listed

#: What a model calls the one whose weights it computes with.
_OWNER = "_dualign_owner"
_HELD: WeakValueDictionary[Hashable, PreTrainedModel] = WeakValueDictionary()


class _Owner:
    """Keeps a model alive, and is not copied with those that refer to it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> _Owner:
        return self


def frozen(
    path: str | Path, load: Callable[[], PreTrainedModel], *how: Hashable
) -> PreTrainedModel:
    """The model in a folder (or on a hub) over weights that all share who ask for it in the same
    way; none of them is to be trained. `load` reads it, and is called where nobody holds it; `how`
    is what its result depends on beside the files."""
    key = (_place(path), how)
    held = _HELD.get(key)
    if held is None:
        held = load()
        held.requires_grad_(False)
        _HELD[key] = held
    made = shared(held)
    made.base_model.__dict__[_OWNER] = _Owner(held)  # a scorer takes it without the policy's head
    return made


def shared(model: Any, trained: bool = False) -> Any:
    """A copy of a model whose frozen weights have the same storage, and if `trained` its other
    weights too. Moving, casting or cutting them leaves the other as it is; arithmetic in place
    changes both."""
    memo: dict[int, Any] = {}
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        if state is not None:  # in 4 bits, beside which lies what they stand for
            memo |= {id(weight): weight, id(state): state}
        elif trained or not weight.requires_grad:
            memo[id(weight)] = torch.nn.Parameter(weight.detach(), weight.requires_grad)
    return copy.deepcopy(model, memo)


def own(model: torch.nn.Module) -> None:
    """Give a model storage of its own, before its weights are changed in place."""
    owners = [module for module in model.modules() if _OWNER in module.__dict__]
    for module in owners:
        del module.__dict__[_OWNER]
    if owners:
        for weight in model.parameters():
            weight.data = weight.data.clone()


def _place(path: str | Path) -> Hashable:
    """A folder with the sizes and times of its files, or a hub id."""
    folder = Path(path)
    if not folder.is_dir():
        return str(path)
    files = [file for file in listed(folder, "*") if file.exists()]  # and no link to nowhere
    stats = [(file.name, file.stat()) for file in files]
    seen = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    return (str(folder.resolve()), seen)
