"""ModelParallelStrategy through a Trainer: what is saved of sharded parameters comes back bit for bit."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_hd import HypergradientDescent
from tests.distributed.processes import run
from tests.distributed.training import OPTIMIZERS, RULES, network, whole
from tests.test_callback import make_trainer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo processes are spawned with POSIX semantics")

Case = tuple[str, str, bool, Any]
CASES: list[Case] = [
    *((name, rule, True, "32-true") for name in ("SGD", "Adam", "RMSprop") for rule in ("auto", "additive")),
    ("SGD", "auto", True, "bf16-true"),
    ("AdamW", "auto", True, "bf16-true"),
    ("Adam", "auto", False, "32-true"),
    ("RMSprop", "additive", False, "bf16-true"),
]
"""Optimizer, rule, whether the checkpoint is distributed, and precision."""


class Sharded(LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.network = network("alone", 7).float()

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].to(next(self.parameters()).dtype)
        loss: Tensor = (self.network(x) - x[:, :3].sin()).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.name](self.parameters())

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(64, 5, generator=torch.Generator().manual_seed(0))), batch_size=8)


def fit(case: Case, folder: Path, ckpt_path: Path | None = None) -> tuple[list[float], list[Tensor]]:
    name, rule, distributed, precision = case
    module, hd = Sharded(name), HypergradientDescent(rule, RULES[rule])
    saver = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
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
    rank, count = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count)
    results = []
    for i, case in enumerate(CASES):
        at = folder / str(i)
        results.append((fit(case, at), fit(case, at / "resumed", at / "epoch=1.ckpt")))
    return results


def test_a_sharded_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    ranks = run(fit_all, 2, tmp_path)
    for rank in ranks:
        assert not isinstance(rank, Exception), rank
        for case, ((lrs, parameters), (resumed_lrs, resumed)) in zip(CASES, rank, strict=True):
            assert len(set(lrs)) > 8, case
            assert resumed_lrs == lrs[len(lrs) // 2 :], case
            assert all(map(torch.equal, resumed, parameters)), case
    assert [whole[0] for whole, _ in ranks[0]] == [whole[0] for whole, _ in ranks[1]]
