"""Checkpoints: the tensors of the engine come back as they were saved, where torch would narrow or leave them out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_hd.directions import DIRECTION, DISCOUNTED
from lightning_hd.reduction import as_real, widen


def keep_tensors(optimizer: Optimizer) -> list[RemovableHandle]:
    """From now on, ``optimizer.load_state_dict`` takes over the engine's tensors as they were saved.

    torch casts all of an optimizer's state to the dtype of its parameters, but the sum of directions of 16-bit
    parameters is kept in float32; and it leaves whole what is not known to be sharded.

    Returns:
        Handles that end this.
    """
    saved: list[tuple[Tensor, str, Tensor]] = []

    def before(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        saved.clear()
        names = (name for group in state_dict["param_groups"] for name in group["params"])
        for name, p in zip(names, _parameters(optimizer), strict=False):  # torch tells if there are not as many
            state = state_dict["state"].get(name, {})
            saved.extend((p, key, state[key]) for key in (DIRECTION, DISCOUNTED) if isinstance(state.get(key), Tensor))

    def after(optimizer: Optimizer) -> None:
        for p, key, tensor in saved:
            if isinstance(p, DTensor) and not isinstance(tensor, DTensor):
                tensor = distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
            optimizer.state[p][key] = tensor.to(p.device, copy=True)
        saved.clear()

    return [optimizer.register_load_state_dict_pre_hook(before), optimizer.register_load_state_dict_post_hook(after)]


def load_tensors(model: nn.Module, optimizer: Optimizer, prefix: str, folder: Path) -> None:
    """Load the engine's tensors from a distributed checkpoint, of which Lightning loads only what the optimizer has.

    Args:
        model: The model, sharded.
        optimizer: The optimizer.
        prefix: What the checkpoint calls it.
        folder: The checkpoint.
    """
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    own = set(_parameters(optimizer))
    tensors = {}
    for name, p in model.named_parameters():
        name = name.replace("_orig_mod.", "")  # torch.compile adds that, the checkpoint leaves it out
        path = f"{prefix}.state.{name}"
        if p in own and f"{path}.{DIRECTION}" in saved:
            tensors[f"{path}.{DIRECTION}"] = optimizer.state[p][DIRECTION] = torch.zeros_like(p.detach())
        if p in own and f"{path}.{DISCOUNTED}" in saved:
            zeros = widen(torch.zeros_like(as_real(p.detach())))
            tensors[f"{path}.{DISCOUNTED}"] = optimizer.state[p][DISCOUNTED] = zeros
    if tensors:
        load(tensors, checkpoint_id=folder)  # in place


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for settings in optimizer.param_groups:
        yield from settings["params"]
