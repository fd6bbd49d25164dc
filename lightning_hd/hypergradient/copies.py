"""Checkpoints: our parameter-sized tensors go into ``optimizer.state_dict()``, not into ``optimizer.state``."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_hd.optimizers import is_marked, parameters_of, torch_class

DIRECTION = "hd_direction"
"""Key of a parameter's copy in ``optimizer.state_dict()["state"]``."""


class Copies:
    """A tensor of the parameter's shape and dtype for each of an optimizer's parameters, saved and loaded with it.

    The optimizer itself does not see them, so it cannot take them for its own state.

    Attributes:
        tensors: The copy of each parameter that has one.
        loads: How often the optimizer has loaded a state.
        stale: Whether the mark of a scheduler has come into the groups with a state.
    """

    def __init__(self) -> None:
        self.tensors: dict[Tensor, Tensor] = {}
        self.loads = 0
        self.stale = False
        self._handles: list[RemovableHandle] = []

    def follow(self, optimizer: Optimizer) -> None:
        """Become the copies of an optimizer: add hooks to its state dict, and take back what ``leave`` has left."""
        _copies[optimizer] = self
        self.stale |= bool(optimizer.state) and is_marked(optimizer.param_groups)
        for p in list(optimizer.state):
            self._take(optimizer.state, p, p)
        self._handles = [
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
        ]

    def leave(self, optimizer: Optimizer, keep: bool) -> None:
        """Remove the hooks.

        Args:
            optimizer: The optimizer.
            keep: Whether to put the copies into its state, for a checkpoint that is written later. An optimizer that
                is not torch's own might take a copy for its own state, so its parameters without a state get none.
        """
        for handle in self._handles:
            handle.remove()
        for p in parameters_of(optimizer) if keep else ():
            if p in self.tensors and (torch_class(type(optimizer)) is not None or optimizer.state.get(p)):
                optimizer.state[p][DIRECTION] = self.tensors[p]
        self.tensors.clear()

    def place_for(self, p: Tensor) -> Tensor:
        """The copy of a parameter, for the caller to write to."""
        copy = self.tensors.get(p)
        if copy is None or (copy.shape, copy.dtype, copy.device) != (p.shape, p.dtype, p.device):
            copy = self.tensors[p] = torch.zeros_like(p.detach())
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": []}

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Add the copies to the saved state. The dictionaries of the optimizer itself do not change."""
        state = dict(state_dict["state"])
        for name, p in zip(_names(state_dict), parameters_of(optimizer), strict=False):
            if p in self.tensors:
                state[name] = {**state.get(name, {}), DIRECTION: self.tensors[p]}
        return {**state_dict, "state": state}

    def _load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Take the copies out of the saved state."""
        self.loads += 1
        self.stale |= is_marked(state_dict["param_groups"]) and not is_marked(optimizer.param_groups)
        self.tensors.clear()
        state = dict(state_dict["state"])
        for name, p in zip(_names(state_dict), parameters_of(optimizer), strict=False):  # torch checks the counts
            self._take(state, name, p)
        return {**state_dict, "state": state}

    def _take(self, states: dict[Any, Any], name: Any, p: Tensor) -> None:
        """Take the copy of a parameter out of the state of this name."""
        saved = states.get(name)
        if isinstance(saved, dict) and isinstance(saved.get(DIRECTION), Tensor):
            self.tensors[p] = _placed(saved[DIRECTION], p)
            states[name] = {key: value for key, value in saved.items() if key != DIRECTION}
            if not states[name]:
                del states[name]


_copies: "weakref.WeakKeyDictionary[Optimizer, Copies]" = weakref.WeakKeyDictionary()


def copies_of(optimizer: Optimizer) -> Copies:
    """The copies of an optimizer's parameters, empty at first."""
    if optimizer not in _copies:
        Copies().follow(optimizer)
    return _copies[optimizer]


@contextmanager
def following(optimizer: Optimizer) -> Iterator[Copies]:
    """The copies of an optimizer's parameters. If the block raises an error, no hook is left that was not there."""
    known = optimizer in _copies
    try:
        yield copies_of(optimizer)
    except BaseException:
        if not known:
            leave_copies(optimizer)
        raise


def leave_copies(optimizer: Optimizer, keep: bool = True) -> None:
    """Take the copies from an optimizer, if it has any; see ``Copies.leave``."""
    if optimizer in _copies:
        _copies.pop(optimizer).leave(optimizer, keep)


def load_copies(model: nn.Module, optimizer: Optimizer, prefix: str, folder: Path) -> None:
    """Load the copies from a distributed checkpoint, because Lightning loads only what the optimizer itself has.

    Args:
        model: The model, which is sharded.
        optimizer: The optimizer.
        prefix: The name of the optimizer in the checkpoint.
        folder: The folder of the checkpoint.
    """
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    trained, copies, tensors = set(parameters_of(optimizer)), copies_of(optimizer), {}
    for name, p in model.named_parameters():
        # torch.compile adds a part to the name, which the checkpoint leaves out
        path = f"{prefix}.state.{name.replace('_orig_mod.', '')}.{DIRECTION}"
        if p in trained and path in saved:
            tensors[path] = copies.place_for(p)
    if tensors:
        load(tensors, checkpoint_id=folder)  # it writes into the copies


def _placed(tensor: Tensor, p: Tensor) -> Tensor:
    """A saved tensor on the parameter's device, sharded as the parameter is."""
    if isinstance(p, DTensor) and not isinstance(tensor, DTensor):
        tensor = distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return tensor.to(p.device, copy=True)


def _names(state_dict: dict[str, Any]) -> Iterator[Any]:
    for group in state_dict["param_groups"]:
        yield from group["params"]
