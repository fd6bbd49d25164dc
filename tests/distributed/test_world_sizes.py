"""Runs of a plain loop that go on with more or fewer processes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from lightning_hd import HypergradientLR
from tests.distributed.processes import run
from tests.distributed.training import BATCH, OPTIMIZERS, Kind, network, share

STEPS, SAVED = 20, 10


def train(kind: Kind, folder: Path, name: str, resume: bool) -> list[float]:
    """The rates of the steps from the beginning, or from the checkpoint."""
    model = network(kind, 8)
    optimizer = OPTIMIZERS[name](model.parameters())
    hd = HypergradientLR(optimizer)
    if resume:
        load(model, optimizer, hd, folder)
    part = share(kind)
    lrs = []
    for step in range(hd.step_count, STEPS):
        if step == SAVED and not resume:
            save(model, optimizer, hd, folder)
        x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        (model(x[part]) - torch.sin(x[part, :3])).square().mean().backward()
        optimizer.step()
        lrs += hd.lrs
    return lrs


def save(model: nn.Module, optimizer: torch.optim.Optimizer, hd: HypergradientLR, folder: Path) -> None:
    tensors = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    save_tensors(tensors, checkpoint_id=str(folder / "tensors"))
    state = hd.state_dict()  # on all processes, for each has a part of it
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(state, folder / "scalars")
    if dist.is_initialized():
        dist.barrier()


def load(model: nn.Module, optimizer: torch.optim.Optimizer, hd: HypergradientLR, folder: Path) -> None:
    tensors: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    load_tensors(tensors, checkpoint_id=str(folder / "tensors"))
    set_state_dict(model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
    hd.load_state_dict(torch.load(folder / "scalars", weights_only=True))


CASES: list[tuple[Kind, str]] = [("ddp", "Adam"), ("sharded", "Adam"), ("sharded", "heavy ball")]


def train_all(folder: Path, resume: bool) -> list[list[float]]:
    return [train(kind, folder / f"{kind} {name}", name, resume) for kind, name in CASES]


def test_a_run_goes_on_with_as_many_more_or_fewer_processes(tmp_path: Path) -> None:
    for kind, name in CASES:
        (tmp_path / f"{kind} {name}").mkdir()
    whole, other = run(train_all, 2, tmp_path, False)
    assert whole == other
    assert [len(lrs) for lrs in whole] == [STEPS] * len(CASES)
    for count in (1, 2, 4):
        for rank in run(train_all, count, tmp_path, True):
            assert not isinstance(rank, Exception), rank
            for lrs, expected, case in zip(rank, whole, CASES, strict=True):
                if count == 2:
                    assert lrs == expected[SAVED:], "bit for bit"
                np.testing.assert_allclose(lrs, expected[SAVED:], rtol=1e-12, err_msg=str(case))
