"""Two real processes: under DDP every rank sees the same gradients, so every rank must take the same rates."""

import json
import multiprocessing.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from lightning_hd import HypergradientDescent
from tests.distributed.processes import preload
from tests.test_callback import Reference, make_trainer

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="gloo processes are spawned with POSIX semantics"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


class Writer(Callback):
    """Each process writes the rates that it took."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        (hd,) = (callback for callback in trainer.callbacks if isinstance(callback, HypergradientDescent))  # type: ignore[attr-defined]
        (self.path / f"rank{trainer.global_rank}.json").write_text(json.dumps(hd.lrs))
        # Nobody else does it, and a process that ends while gloo's threads run may abort.
        multiprocessing.util.Finalize(None, dist.destroy_process_group, exitpriority=1)


def test_rates_are_bitwise_equal_on_both_ranks(tmp_path: Path) -> None:
    preload()
    strategy = DDPStrategy(start_method="forkserver")
    trainer = make_trainer(
        tmp_path, HypergradientDescent(), Writer(tmp_path), strategy=strategy, devices=2, log_every_n_steps=10
    )
    trainer.fit(Reference())
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert len(first["lr-SGD"]) == 100
    assert max(first["lr-SGD"]) > 0.011
