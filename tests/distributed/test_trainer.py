"""Trainings that are killed: they end, and go on from Lightning's checkpoint as if nothing had happened."""

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from lightning_hd import HypergradientDescent
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


def train(processes: int, path: Path, *callbacks: Callback, resume_from: Path | None = None) -> None:
    module, hd = Shuffled(processes), HypergradientDescent()
    saver = ModelCheckpoint(path, "last", every_n_train_steps=8 if processes == 1 else None)
    strategy: Any = "auto" if processes == 1 else DDPStrategy(timeout=timedelta(seconds=TIMEOUT_S))
    trainer = make_trainer(path, hd, saver, *callbacks, max_epochs=3, devices=processes, strategy=strategy)
    trainer.fit(module, ckpt_path=resume_from)
    torch.save((hd.lrs["lr-Adam"], list(module.parameters())), path / f"rank{trainer.global_rank}")


def start(processes: int, path: Path, *what: str) -> tuple[int, str]:
    """Run this file as a script, in a session of its own, and kill what is left of it."""
    script = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.test_trainer", str(processes), str(path), *what],
        cwd=Path(__file__).parents[2],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = script.communicate(timeout=240)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
    return script.returncode, output


@pytest.mark.parametrize(
    ("processes", "killed_at", "saved"), [pytest.param(1, 37, 32, marks=pytest.mark.slow), (2, 22, 15)]
)
def test_a_killed_run_ends_and_goes_on_bit_for_bit(processes: int, killed_at: int, saved: int, tmp_path: Path) -> None:
    returncode, output = start(processes, tmp_path, "--kill-at", str(killed_at))
    assert time.time() - (tmp_path / "death").stat().st_mtime < TIMEOUT_S
    # Of two processes, this is rank 0: its own error ends it, or Lightning, which looks every 5 s whether rank 1 lives.
    assert returncode == -signal.SIGKILL or (processes == 2 and returncode and "RuntimeError:" in output), output
    returncode, output = start(processes, tmp_path)
    assert returncode == 0, output
    for rank in range(processes):
        lrs, parameters = torch.load(tmp_path / "whole" / f"rank{rank}")
        resumed_lrs, resumed_parameters = torch.load(tmp_path / "resumed" / f"rank{rank}")
        assert len(resumed_lrs) == len(lrs) - saved
        assert resumed_lrs == lrs[saved:]
        assert all(map(torch.equal, resumed_parameters, parameters))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("processes", type=int)
    parser.add_argument("path", type=Path)
    parser.add_argument("--kill-at", type=int)
    a = parser.parse_args()
    if a.kill_at is None:
        train(a.processes, a.path / "resumed", resume_from=a.path / "killed" / "last.ckpt")
    else:
        train(a.processes, a.path / "whole")
        train(a.processes, a.path / "killed", Death(a.kill_at, a.path / "death"))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
