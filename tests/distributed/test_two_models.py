"""Two models that train apart in one job, each on two processes."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam

from lightning_hd.trainer.attachment import TrainerEngine
from tests import reference
from tests.distributed.processes import run
from tests.distributed.training import whole

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo processes are started with POSIX semantics")

STEPS = 50


def train_pair(pair: int, data: DeviceMesh | None) -> tuple[list[float], list[Tensor]]:
    """One of two models, on the processes of a mesh with DDP or sharded, or on this process alone."""
    model: Any = reference.torch_network()
    group, part = None, slice(None)
    if data is not None:
        group, part = data.get_group(), slice(data.get_local_rank(), None, 2)
        model = DistributedDataParallel(model, process_group=group) if pair == 0 else fully_shard(model, mesh=data)
    optimizer = Adam(model.parameters())
    hd = TrainerEngine(optimizer, process_group=group)
    lrs = []
    for x, y in reference.torch_batches()[pair::2][:STEPS]:
        optimizer.zero_grad()
        reference.torch_loss(model, x[part], y[part]).backward()
        optimizer.step()
        lrs += hd.lrs
    hd.check_agreement()
    return lrs, [whole(p) for p in model.parameters()]


def train_pairs() -> tuple[list[float], list[Tensor]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("models", "data"))
    return train_pair(mesh.get_local_rank("models"), mesh["data"])


def test_two_models_in_one_job_tune_apart() -> None:
    ranks = run(train_pairs, 4)
    for pair in range(2):
        (lrs, parameters), (others, _) = ranks[2 * pair : 2 * pair + 2]
        assert lrs == others, "bit for bit"
        expected, parameters_alone = train_pair(pair, None)
        np.testing.assert_allclose(lrs, expected, rtol=1e-12)
        for p, q in zip(parameters, parameters_alone, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert ranks[0][0][-1] != pytest.approx(ranks[2][0][-1], rel=0.01)
