"""Two real processes: under DDP every rank sees the same gradients and losses, so all must take the same rates."""

import json
import multiprocessing.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy

from lightning_hd import HypergradientDescent
from tests.distributed.processes import preload
from tests.test_callback import Reference, make_trainer

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="gloo processes are spawned with POSIX semantics"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


class Writer(Callback):
    """Each process writes the rates that it took, the losses of its own batches, and those that the engine knows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.losses: dict[str, list[Any]] = {"of batches": [], "of steps": []}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        (hd,) = (callback for callback in trainer.callbacks if isinstance(callback, HypergradientDescent))  # type: ignore[attr-defined]
        self.losses["of batches"].append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        if hd.engines[0].step_count > len(self.losses["of steps"]):
            self.losses["of steps"].append(hd.engines[0].stats.loss)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        (hd,) = (callback for callback in trainer.callbacks if isinstance(callback, HypergradientDescent))  # type: ignore[attr-defined]
        numbers = {**hd.lrs, **self.losses}
        (self.path / f"rank{trainer.global_rank}.json").write_text(json.dumps(numbers))
        # Nobody else does it, and a process that ends while gloo's threads run may abort.
        multiprocessing.util.Finalize(None, dist.destroy_process_group, exitpriority=1)


def test_rates_are_bitwise_equal_on_both_ranks(tmp_path: Path) -> None:
    preload()
    strategy = DDPStrategy(start_method="forkserver")
    accumulation = GradientAccumulationScheduler({0: 3, 1: 1})
    callbacks = HypergradientDescent(), accumulation, Writer(tmp_path)
    trainer = make_trainer(tmp_path, *callbacks, strategy=strategy, devices=2, log_every_n_steps=10, max_epochs=2)
    trainer.fit(Reference())
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    own = [np.array(rank.pop("of batches")) for rank in (first, second)]
    assert first == second
    assert len(first["lr-SGD"]) == 34 + 100
    assert max(first["lr-SGD"]) > 0.011
    windows = np.split(np.mean(own, 0), [*range(3, 100, 3), *range(100, 200)])
    assert first["of steps"] == pytest.approx([part.mean() for part in windows], rel=1e-6)
    assert np.any(own[0] != own[1])
