"""Jobs that torchrun starts: two nodes of which a process dies, and two models that train apart in one job."""

import gc
import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam

from lightning_hd import HypergradientDescent
from lightning_hd.trainer.attachment import TrainerEngine
from tests import reference
from tests.distributed.test_example import finish, start
from tests.distributed.training import whole
from tests.loader import Resumable
from tests.test_callback import Reference, make_trainer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo processes are started with POSIX semantics")

EPOCH, STEPS, SAVED, DEAD = 25, 50, 30, 37


def torchrun(options: list[str], worker: str, folder: Path) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    return start(root, "-m", "torch.distributed.run", *options, "-m", __name__, worker, str(folder))


class DieOnce(Callback):
    """The second process is killed in mid-run, unless one has been."""

    def __init__(self, died: Path) -> None:
        self.died = died

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == DEAD and trainer.global_rank == 1 and not self.died.exists():
            self.died.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def train_node(folder: Path) -> tuple[int, list[float], list[Tensor]]:
    """The number of restarts, the rates since the last one, and the parameters."""
    module, hd = Reference(lambda network: Adam(network.parameters())), HypergradientDescent()
    saver = ModelCheckpoint(folder, every_n_train_steps=10, save_last=True)
    nodes: dict[str, Any] = {"num_nodes": 2, "strategy": DDPStrategy(timeout=timedelta(seconds=60))}
    trainer = make_trainer(folder, hd, saver, DieOnce(folder / "died"), max_epochs=2, log_every_n_steps=5, **nodes)
    data = reference.torch_batches()
    trainer.fit(module, Resumable(lambda _: data[trainer.global_rank :: 2][:EPOCH]), ckpt_path="last")
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"]), hd.lrs["lr-Adam"], list(module.state_dict().values())


def run_nodes(folder: Path) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--local-addr", "127.0.0.1"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", "1", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    finish([torchrun(nodes + rendezvous, "train_node", folder) for _ in range(2)])
    return [torch.load(folder / f"rank{rank}") for rank in range(2)]


def test_a_job_whose_process_is_killed_is_restarted_and_ends_as_if_undisturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else restarted processes may find each other's former addresses in torchrun's store: pytorch/pytorch#135712.
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "undisturbed" / "died").touch()
    undisturbed = run_nodes(tmp_path / "undisturbed")
    disturbed = run_nodes(tmp_path)
    assert (tmp_path / "died").exists()
    assert [restarts for restarts, *_ in undisturbed] == [0, 0]
    assert max(restarts for restarts, *_ in disturbed) >= 1, "a node that only follows the other's restart counts none"
    _, expected, parameters = undisturbed[0]
    assert len(expected) == STEPS
    for (_, lrs, own), first in zip(undisturbed + disturbed, (0, 0, SAVED, SAVED), strict=True):
        assert lrs == expected[first:], "bit for bit"
        assert all(map(torch.equal, own, parameters))


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


def train_pairs(folder: Path) -> tuple[list[float], list[Tensor]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("models", "data"))
    return train_pair(mesh.get_local_rank("models"), mesh["data"])


def test_two_models_in_one_job_tune_apart(tmp_path: Path) -> None:
    finish([torchrun(["--standalone", "--nproc-per-node", "4"], "train_pairs", tmp_path)])
    ranks = [torch.load(tmp_path / f"rank{rank}") for rank in range(4)]
    for pair in range(2):
        (lrs, parameters), (others, _) = ranks[2 * pair : 2 * pair + 2]
        assert lrs == others, "bit for bit"
        expected, parameters_alone = train_pair(pair, None)
        np.testing.assert_allclose(lrs, expected, rtol=1e-12)
        for p, q in zip(parameters, parameters_alone, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert ranks[0][0][-1] != pytest.approx(ranks[2][0][-1], rel=0.01)


if __name__ == "__main__":
    signal.alarm(90)  # it must end, even if torchrun was killed
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    output = Path(sys.argv[2])
    result = {"train_node": train_node, "train_pairs": train_pairs}[sys.argv[1]](output)
    torch.save(result, output / f"rank{dist.get_rank()}")
    gc.collect()  # what is left of models holds process groups, whose threads must not outlive the interpreter
    dist.destroy_process_group()
