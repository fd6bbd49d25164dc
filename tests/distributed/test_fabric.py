"""Lightning Fabric: a HypergradientLR in the loop, and nothing else, tunes as in plain torch."""

import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lightning_hd import HypergradientLR
from lightning_hd.trainer.attachment import TrainerEngine
from tests.distributed.processes import run, tell_lightning
from tests.distributed.training import BATCH, OPTIMIZERS, network, whole

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo processes are spawned with POSIX semantics")

STEPS, SAVED = 20, 10
ACCUMULATED, CLIPPED_TO = 2, 0.5
NAMES = ("SGD", "Nesterov", "Adam")


class Problem(nn.Module):
    """A network with its loss: Fabric rounds what a module returns to float32, and a loss can stand that."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network("alone", 7)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = (self.network(x) - y).square().mean()
        return loss


class Run(NamedTuple):
    """The rates of all steps, how many gradients were clipped, and the last parameters."""

    lrs: list[float]
    clipped: int
    parameters: list[Tensor]


def batches(step: int) -> list[tuple[Tensor, Tensor]]:
    """What is accumulated for one step."""
    x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    y = torch.sin(x @ torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3))
    return list(zip(x.chunk(ACCUMULATED), y.chunk(ACCUMULATED), strict=True))


def train_plain(name: str) -> Run:
    model = Problem()
    optimizer = OPTIMIZERS[name](model.parameters())
    hd = HypergradientLR(optimizer)
    lrs, clipped = [], 0
    for step in range(STEPS):
        optimizer.zero_grad()
        for x, y in batches(step):
            (model(x, y) / ACCUMULATED).backward()
        clipped += bool(nn.utils.clip_grad_norm_(model.parameters(), CLIPPED_TO) > CLIPPED_TO)
        optimizer.step()
        lrs += hd.lrs
    assert 0 < clipped < STEPS
    return Run(lrs, clipped, [whole(p) for p in model.parameters()])


def train(fabric: Fabric, model: Any, name: str, raw: bool, path: Path, resume: bool = False) -> Run:
    """The same with Fabric, attached to the optimizer that it returned, or to the ``raw`` one that it was given."""
    sharded = isinstance(fabric.strategy, ModelParallelStrategy)
    if sharded:
        model = fabric.setup_module(model)
    optimizer: Any = OPTIMIZERS[name](model.parameters())
    early = TrainerEngine(optimizer) if raw else None
    if sharded:
        optimizer = fabric.setup_optimizers(optimizer)
    else:
        model, optimizer = fabric.setup(model, optimizer)
    hd = early or TrainerEngine(optimizer)
    if resume:
        state = {"model": model, "optimizer": optimizer, "hd": hd.state_dict()}
        fabric.load(path, state)
        hd.load_state_dict(state["hd"])
    lrs, clipped = [], 0
    for step in range(hd.step_count, STEPS):
        if step == SAVED and not resume:
            fabric.save(path, {"model": model, "optimizer": optimizer, "hd": hd.state_dict()})
        optimizer.zero_grad()
        for i, pair in enumerate(batches(step)):
            x, y = (part.chunk(fabric.world_size)[fabric.global_rank] for part in pair)
            with fabric.no_backward_sync(model, enabled=i < ACCUMULATED - 1):
                fabric.backward(model(x, y) / ACCUMULATED)
        norm = fabric.clip_gradients(model, optimizer, max_norm=CLIPPED_TO)
        assert norm is not None
        clipped += bool(whole(norm) > CLIPPED_TO)
        optimizer.step()
        lrs += hd.lrs
    hd.check_agreement()
    return Run(lrs, clipped, [whole(p) for p in model.parameters()])


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    assert mesh["data_parallel"].size() == dist.get_world_size()
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def train_all(folder: Path) -> dict[tuple[str, bool, str], Run]:
    """On one rank: with copies and with shards, from the beginning and from a checkpoint on."""
    tell_lightning()
    count = dist.get_world_size()
    # ModelParallelStrategy does not support 64-true, but with 32-true a model in float64 stays so.
    ways: list[tuple[Any, Any]] = [(DDPStrategy(), "64-true"), (ModelParallelStrategy(shard, count, 1), "32-true")]
    runs = {}
    for strategy, precision in ways:
        environment = TorchElasticEnvironment()
        fabric = Fabric(accelerator="cpu", strategy=strategy, devices=count, precision=precision, plugins=[environment])
        fabric.launch()
        assert fabric.world_size == count
        for name in NAMES:
            for raw in (False, True) if name == "Adam" else (False,):
                kind = type(strategy).__name__
                path = folder / f"{kind} {name} {raw}"
                runs[name, raw, kind] = train(fabric, Problem(), name, raw, path)
                runs[name, raw, f"{kind}, resumed"] = train(fabric, Problem(), name, raw, path, resume=True)
    return runs


def test_processes_tune_as_plain_torch_on_one_does_and_resume_bit_for_bit(tmp_path: Path) -> None:
    ranks = run(train_all, 2, tmp_path)
    for rank in ranks:
        assert not isinstance(rank, Exception), rank
    expected = {name: train_plain(name) for name in NAMES}
    assert len(ranks[0]) == 4 * (len(NAMES) + 1)
    for (name, raw, how), trained in ranks[0].items():
        assert trained.lrs == ranks[1][name, raw, how].lrs, "bit for bit"
        kind, _, resumed = how.partition(", ")
        if resumed:
            undisturbed = ranks[0][name, raw, kind]
            assert trained.lrs == undisturbed.lrs[SAVED:]
            assert all(map(torch.equal, trained.parameters, undisturbed.parameters))
            continue
        assert trained.clipped == expected[name].clipped
        # Torch 2.9 clips shards to 1 - 8.5e-7 of the norm where it clips whole tensors to 1 - 6.2e-7. 2.13 does not.
        inexact = torch.__version__ < "2.13" and kind == "ModelParallelStrategy"
        rtol, atol = (2e-6, 1e-6) if inexact else (1e-12, 1e-13)
        np.testing.assert_allclose(trained.lrs, expected[name].lrs, rtol=rtol, err_msg=f"{name} {how}")
        for p, q in zip(trained.parameters, expected[name].parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", NAMES)
def test_one_process_tunes_as_plain_torch_bit_for_bit_and_resumes_so(name: str, tmp_path: Path) -> None:
    expected = train_plain(name)
    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    for raw in (False, True):
        for resume in (False, True):
            trained = train(fabric, Problem(), name, raw, tmp_path / "saved", resume)
            assert trained.lrs == expected.lrs[SAVED if resume else 0 :]
            assert all(map(torch.equal, trained.parameters, expected.parameters))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_low_precisions_are_tuned_much_alike(precision: Literal["bf16-true", "bf16-mixed"], tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    for name in NAMES:
        trained = train(fabric, Problem().float(), name, False, tmp_path / "saved")
        # The first moves, of 1e-4 of the parameters, are far below the rounding of bfloat16.
        tolerance = 0.5 if precision == "bf16-true" else 0.05
        np.testing.assert_allclose(trained.lrs, train_plain(name).lrs, rtol=tolerance)
