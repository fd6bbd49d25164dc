"""The loss that engines get in a Trainer: the mean over the batches of a step, however Lightning scales it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_hd import HypergradientDescent
from tests.test_callback import Reference, make_trainer
from tests.test_loops import EverySecond, Manual, Reluctant, Skipping

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*training_step. returned .None.*"),
]


class Losses(Callback):
    """Notes the loss of each batch, and that of each step as the engine knows it."""

    def __init__(self, hd: HypergradientDescent) -> None:
        self.hd = hd
        self.of_batches: list[float] = []
        self.of_steps: list[float | None] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        whole = pl_module.training_step

        def training_step(*batch: Any) -> Any:
            loss = whole(*batch)
            self.of_batches.append(np.nan if loss is None else loss.item())
            return loss

        pl_module.training_step = training_step

    def on_train_batch_end(self, *_: Any) -> None:
        (engine,) = self.hd.engines
        if engine.step_count > len(self.of_steps):
            self.of_steps.append(engine.stats.loss)


def scaled() -> dict[str, Any]:
    """Arguments of a Trainer with a GradScaler, whose scale changes in every fourth step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler)}


def windows(*counts: int) -> list[int]:
    """The number of batches in each step, where 20 batches make an epoch of some of these accumulations."""
    return [size for count in counts for size in [count] * (20 // count) + [20 % count] * (20 % count > 0)]


@pytest.mark.parametrize("arguments", [dict, scaled], ids=["32-true", "GradScaler"])
@pytest.mark.parametrize("counts", [(1,), (4,), (3, 3), (4, 1), (1, 3, 2)], ids=str)
def test_the_loss_of_a_step_is_the_mean_of_its_batches(
    counts: tuple[int, ...], arguments: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    hd = HypergradientDescent()
    losses, accumulation = Losses(hd), GradientAccumulationScheduler(dict(enumerate(counts)))
    settings = {"limit_train_batches": 20, "max_epochs": len(counts), **arguments()}
    make_trainer(tmp_path, hd, losses, accumulation, **settings).fit(Reference())
    sizes = windows(*counts)
    expected = [np.mean(part) for part in np.split(np.array(losses.of_batches), np.cumsum(sizes)[:-1])]
    assert losses.of_steps == pytest.approx(expected, rel=1e-6)
    assert len(expected) == len(sizes)


@pytest.mark.parametrize("module", [Reluctant, Skipping, EverySecond])
def test_a_batch_whose_gradient_is_dropped_does_not_count(module: type[Reference], tmp_path: Path) -> None:
    hd = HypergradientDescent()
    losses = Losses(hd)
    make_trainer(tmp_path, hd, losses, limit_train_batches=20).fit(module())
    steps = losses.of_batches[::2] if module is EverySecond else [x for i, x in enumerate(losses.of_batches) if i % 3]
    assert losses.of_steps == pytest.approx(steps, rel=1e-6)


@pytest.mark.parametrize("known", [True, False])
def test_in_manual_optimization_the_loss_is_what_the_module_reports(known: bool, tmp_path: Path) -> None:
    hd = HypergradientDescent()

    class Scaling(Manual):
        """Accumulates three batches, whose losses it scales by itself."""

        def manual_backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
            if known:
                hd.engines[0].observe(loss)
            super().manual_backward(loss / 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            loss: Tensor = self.parts[0](batch[0].double()).square().mean()
            self.manual_backward(loss)
            if batch_idx % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
            return loss.detach()

        def configure_optimizers(self) -> Any:
            return super().configure_optimizers()[0]

    losses = Losses(hd)
    make_trainer(tmp_path, hd, losses, limit_train_batches=18).fit(Scaling())
    expected = np.reshape(losses.of_batches, (6, 3)).mean(1)
    assert losses.of_steps == (pytest.approx(expected) if known else [None] * 6)
