"""Makes a run in a Trainer, and keeps what was measured in a file."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from paper.data import Images, Labelled
from paper.models import CLASSES, make_network
from paper.settings import BATCH, Run, make_callbacks, make_optimizer

VAL_BATCH = 1000
WINDOW = 50
"""Over how many iterations the training loss is averaged where it is compared with a threshold."""


@dataclass
class Measured:
    """What is measured of a run: after each iteration, and after each epoch."""

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    val_losses: list[float] = field(default_factory=list)
    val_accuracies: list[float] = field(default_factory=list)

    def has_reached(self, threshold: float) -> bool:
        """Whether the training loss, averaged over the last iterations, is as low as that."""
        return len(self.losses) >= WINDOW and fmean(self.losses[-WINDOW:]) <= threshold


def by_epoch(values: Sequence[float], run: Run) -> list[float]:
    """The mean over the iterations of each epoch."""
    starts = range(0, len(values), run.iterations)
    return [fmean(values[start : start + run.iterations]) for start in starts]


class Classifier(LightningModule):
    """A network that is trained with cross entropy."""

    def __init__(self, network: nn.Module, run: Run) -> None:
        super().__init__()
        self.network = network
        self.run = run
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

    def training_step(self, batch: Labelled, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    def validation_step(self, batch: Labelled, batch_idx: int) -> None:
        """Loss and accuracy over the validation set."""
        x, y = batch
        logits = self.network(x)
        self.accuracy(logits, y)
        self.log("val_accuracy", self.accuracy)
        self.log("val_loss", nn.functional.cross_entropy(logits, y), batch_size=len(y))

    def configure_optimizers(self) -> Optimizer:
        """The optimizer of the run."""
        return make_optimizer(self.run, self.network.parameters())


class History(Callback):
    """Collects what is measured, also over an interruption.

    Args:
        run: The run that is made.
        advance: Called with the number of iterations that are over.
    """

    def __init__(self, run: Run, advance: Callable[[int], object]) -> None:
        self.run = run
        self.advance = advance
        self.measured = Measured()

    def state_dict(self) -> dict[str, Any]:
        """Goes into checkpoints."""
        return asdict(self.measured)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.measured = Measured(**state_dict)
        self.advance(len(self.measured.losses))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Dropout does not depend on whether the run was interrupted before."""
        torch.manual_seed(1_000_000 * self.run.seed + trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep loss and rate; stop at the threshold, or where nothing can be learned any more."""
        loss = outputs["loss"].item()
        self.measured.losses.append(loss)
        self.measured.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))
        reached = self.run.threshold is not None and self.measured.has_reached(self.run.threshold)
        if reached or not math.isfinite(loss):
            trainer.should_stop = True
        self.advance(1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the means over the validation set."""
        self.measured.val_losses.append(trainer.callback_metrics["val_loss"].item())
        self.measured.val_accuracies.append(trainer.callback_metrics["val_accuracy"].item())


class Shuffled(Sampler[Tensor]):
    """The indices of batches in an order that depends on the number of the epoch only."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        # This begins with the first item: after an interruption, Lightning makes the iterator before it sets the epoch.
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        yield from torch.split(torch.randperm(self.length, generator=generator), BATCH)

    def __len__(self) -> int:
        return math.ceil(self.length / BATCH)


def loaders(run: Run, images: Images) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Whole batches are picked from tensors in memory: faster, for small images, than processes that load them."""
    train, val = (TensorDataset(x[: run.images], y[: run.images]) for x, y in (images.train, images.val))
    in_order = torch.split(torch.arange(len(val)), VAL_BATCH)
    return (
        DataLoader(train, sampler=Shuffled(len(train), run.seed), batch_size=None),
        DataLoader(val, sampler=in_order, batch_size=None),
    )


def is_made(run: Run, folder: Path) -> bool:
    """Whether a run is finished."""
    return (folder / f"{run.file}.json").exists()


def load(run: Run, folder: Path) -> Measured:
    """What was measured of a finished run."""
    return Measured(**json.loads((folder / f"{run.file}.json").read_text())["measured"])


def train(run: Run, images: Images, folder: Path, advance: Callable[[int], object]) -> None:
    """Make a run, from its last checkpoint where it was interrupted.

    Args:
        run: The run.
        images: What to train and to validate with.
        folder: Where the files of finished runs are, and the checkpoints of others.
        advance: Called with the number of iterations that are over. There may be less of them than epochs would have.
    """
    checkpoint = folder / f"{run.file}.ckpt"
    torch.manual_seed(run.seed)
    network = make_network(run.experiment, images.train[0][: run.images], run.width)
    history = History(run, advance)
    saving = ModelCheckpoint(folder, run.file, save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=run.epochs,
        callbacks=[*make_callbacks(run), history, saving],
        logger=False,
        limit_val_batches=None if run.threshold is None else 0,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(network, run), *loaders(run, images), ckpt_path=checkpoint if checkpoint.exists() else None)
    write(folder / f"{run.file}.json", json.dumps({"run": asdict(run), "measured": asdict(history.measured)}))
    checkpoint.unlink(missing_ok=True)


def write(path: Path, content: str) -> None:
    """Write a file that is there as a whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content)
    partial.replace(path)
