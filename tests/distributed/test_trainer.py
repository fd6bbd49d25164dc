"""Trainings that are killed: they end, and go on from Lightning's checkpoint as if nothing had happened."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from lightning_hd import HypergradientDescent
from tests.distributed.processes import run, tell_lightning
from tests.loader import Resumable
from tests.test_callback import Digits, make_trainer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo processes are started with POSIX semantics")

BATCH, TIMEOUT_S = 64, 30


def batches(data: TensorDataset, epoch: int) -> list[tuple[Tensor, ...]]:
    """In another order in each epoch."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch))
    return [data[part] for part in order.split(BATCH)]


class Shuffled(Digits):
    def __init__(self, processes: int) -> None:
        super().__init__(Adam, 1e-3)
        self.processes = processes

    def train_dataloader(self) -> Any:
        data = super().train_dataloader().dataset
        return Resumable(partial(batches, data)) if self.processes == 1 else DataLoader(data, BATCH, shuffle=True)


class Death(Callback):
    """The last process kills itself."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            self.path.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def train(path: Path, *callbacks: Callback, resume_from: Path | None = None) -> tuple[list[float], list[Tensor]]:
    """The rates of the steps, and the last parameters."""
    processes = dist.get_world_size()
    tell_lightning()
    module, hd = Shuffled(processes), HypergradientDescent()
    saver = ModelCheckpoint(path, "last", every_n_train_steps=8 if processes == 1 else None)
    several: dict[str, Any] = {"strategy": DDPStrategy(), "devices": processes, "plugins": [TorchElasticEnvironment()]}
    trainer = make_trainer(path, hd, saver, *callbacks, max_epochs=3, **(several if processes > 1 else {}))
    trainer.fit(module, ckpt_path=resume_from)
    return hd.lrs["lr-Adam"], [p.detach() for p in module.parameters()]


def train_whole_and_killed(path: Path, killed_at: int) -> str:
    torch.save(train(path / "whole"), path / f"rank{dist.get_rank()}")
    train(path / "killed", Death(killed_at, path / "death"))
    return "not killed"


def train_resumed(path: Path) -> tuple[list[float], list[Tensor]]:
    return train(path / "resumed", resume_from=path / "killed" / "last.ckpt")


@pytest.mark.parametrize(
    ("processes", "killed_at", "saved"), [pytest.param(1, 37, 32, marks=pytest.mark.slow), (2, 22, 15)]
)
def test_a_killed_run_ends_and_goes_on_bit_for_bit(processes: int, killed_at: int, saved: int, tmp_path: Path) -> None:
    *others, killed = run(train_whole_and_killed, processes, tmp_path, killed_at)
    assert time.time() - (tmp_path / "death").stat().st_mtime < TIMEOUT_S
    assert killed is None
    assert all(isinstance(other, RuntimeError) for other in others), others
    for rank, resumed in enumerate(run(train_resumed, processes, tmp_path)):
        assert not isinstance(resumed, Exception), resumed
        lrs, parameters = torch.load(tmp_path / f"rank{rank}")
        resumed_lrs, resumed_parameters = resumed
        assert len(resumed_lrs) == len(lrs) - saved
        assert resumed_lrs == lrs[saved:]
        assert all(map(torch.equal, resumed_parameters, parameters))
