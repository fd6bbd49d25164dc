"""Through a Trainer: sharded runs resume bit for bit, and runs go on with more or fewer processes."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_hd import HypergradientDescent
from tests.distributed.processes import run, tell_lightning
from tests.distributed.training import OPTIMIZERS, RULES, network, whole
from tests.test_callback import make_trainer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo processes are spawned with POSIX semantics")

Case = tuple[str, Any, bool, Any]
CASES: list[Case] = [
    ("SGD", "auto", True, "32-true"),
    ("SGD", "additive", True, "32-true"),
    ("Adam", "auto", True, "32-true"),
    ("RMSprop", "additive", True, "32-true"),
    ("AdamW", "auto", True, "bf16-true"),
    ("Adam", "auto", False, "32-true"),
    ("RMSprop", "additive", False, "bf16-true"),
]
"""Optimizer, rule, whether the checkpoint is distributed, and precision."""


class Sharded(LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.batch_size = 8
        self.network = network("alone", 7).float()

    def configure_model(self) -> None:
        if self.device_mesh is None:  # DDP
            return
        fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].to(next(self.parameters()).dtype)
        loss: Tensor = (self.network(x) - x[:, :3].sin()).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.name](self.parameters())

    def train_dataloader(self) -> Any:
        return DataLoader(
            TensorDataset(torch.randn(64, 5, generator=torch.Generator().manual_seed(0))), batch_size=self.batch_size
        )


def fit(case: Case, folder: Path, ckpt_path: Path | None = None) -> tuple[list[float], list[Tensor]]:
    name, rule, distributed, precision = case
    module, hd = Sharded(name), HypergradientDescent(rule, hypergrad_lr=RULES[rule])
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=2)
    strategy = ModelParallelStrategy(dist.get_world_size(), 1, save_distributed_checkpoint=distributed)
    plugins = [TorchElasticEnvironment()]
    trainer = make_trainer(
        folder, hd, saver, max_epochs=4, devices=2, strategy=strategy, precision=precision, plugins=plugins
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    (lrs,) = hd.lrs.values()
    return lrs, [whole(p) for p in module.parameters()]


def fit_all(folder: Path) -> list[Any]:
    """Each case from the beginning, and from the checkpoint of its second epoch."""
    tell_lightning()
    results = []
    for i, case in enumerate(CASES):
        at = folder / str(i)
        results.append((fit(case, at), fit(case, at / "resumed", at / "epoch=1.ckpt")))
    return results


def fit_on(strategy: str, folder: Path, ckpt_path: Path | None) -> list[float]:
    """The same global batches in float64 on any number of processes."""
    count = dist.get_world_size()
    tell_lightning()
    module, hd = Sharded("Adam"), HypergradientDescent()
    module.network.double()
    module.batch_size = 32 // count
    made: Any = (
        ModelParallelStrategy(count, 1, save_distributed_checkpoint=True) if strategy == "sharded" else DDPStrategy()
    )
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=4)
    arguments: dict[str, Any] = {"max_epochs": 8, "devices": count, "plugins": [TorchElasticEnvironment()]}
    make_trainer(folder, hd, saver, strategy=made, **arguments).fit(module, ckpt_path=ckpt_path)
    for p in module.parameters():
        assert isinstance(p, DTensor) == (strategy == "sharded")
    return hd.lrs["lr-Adam"]


def fit_on_all(folder: Path, resume: bool) -> list[list[float]]:
    return [
        fit_on(
            strategy,
            folder / f"{strategy} {dist.get_world_size()}",
            folder / f"{strategy} 2" / "epoch=3.ckpt" if resume else None,
        )
        for strategy in ("ddp", "sharded")
    ]


def test_runs_go_on_with_more_or_fewer_processes(tmp_path: Path) -> None:
    whole, other = run(fit_on_all, 2, tmp_path, False)
    assert whole == other, "bit for bit"
    assert [len(set(lrs)) for lrs in whole] == [16, 16]
    for count in (1, 4):
        for rank in run(fit_on_all, count, tmp_path, True):
            assert not isinstance(rank, Exception), rank
            for lrs, expected in zip(rank, whole, strict=True):
                np.testing.assert_allclose(lrs, expected[8:], rtol=1e-12)


def test_a_sharded_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    ranks = run(fit_all, 2, tmp_path)
    for rank in ranks:
        assert not isinstance(rank, Exception), rank
        for case, ((lrs, parameters), (resumed_lrs, resumed)) in zip(CASES, rank, strict=True):
            assert len(set(lrs)) > 8, case
            assert resumed_lrs == lrs[len(lrs) // 2 :], case
            assert all(map(torch.equal, resumed, parameters)), case
    assert [whole[0] for whole, _ in ranks[0]] == [whole[0] for whole, _ in ranks[1]]
