"""Train a small network on scikit-learn's digits from a bad learning rate, without and with HypergradientDescent.

python examples/quickstart.py
"""

import argparse
import logging
import warnings
from itertools import count
from pathlib import Path
from statistics import median

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_hd import HypergradientDescent


class Classifier(LightningModule):
    """A network of one hidden layer."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        x, y = batch
        loss = nn.functional.cross_entropy(self.network(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Cross entropy and accuracy."""
        x, y = batch
        logits = self.network(x)
        self.accuracy(logits, y)
        self.log("val_accuracy", self.accuracy)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum; any other optimizer does as well."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def loaders() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """1347 digits to train with and 450 to validate with."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, random_state=0, stratify=labels)
    train_x, val_x = (torch.tensor(x, dtype=torch.float32) for x in parts[:2])
    train_y, val_y = (torch.tensor(y) for y in parts[2:])
    train = DataLoader(TensorDataset(train_x, train_y), batch_size=64, shuffle=True)
    return train, DataLoader(TensorDataset(val_x, val_y), batch_size=450)


def free(folder: Path) -> Path:
    """The folder, or ``folder-2``, ``folder-3`` … if it exists, so that each start has curves of its own."""
    names = (f"{folder.name}-{i}" if i > 1 else folder.name for i in count(1))
    return next(path for path in map(folder.with_name, names) if not path.exists())


def fit(name: str, lr: float, epochs: int, logs: Path, callback: HypergradientDescent) -> dict[str, float]:
    """Train once; returns the validation metrics of the last epoch."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=TensorBoardLogger(logs, name="", version=name),
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(lr), *loaders())
    return {key: float(trainer.callback_metrics[key]) for key in ("val_accuracy", "val_loss")}


def main() -> None:
    """Both runs, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=1e-5, help="configured learning rate (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=25, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="folder of the event files (default: runs)")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")

    logs = free(arguments.folder / "quickstart")
    untuned = HypergradientDescent("additive", hypergrad_lr=0)  # trains as without it, bit for bit, and logs the same
    plain = fit("plain", arguments.lr, arguments.epochs, logs, untuned)
    callback = HypergradientDescent()
    tuned = fit("hypergradient", arguments.lr, arguments.epochs, logs, callback)
    (lrs,) = callback.lrs.values()

    print(f"\n{'':22}{'val accuracy':>14}{'val loss':>12}{'configured':>12}{'median lr':>12}")
    for name, metrics, lr in (("without", plain, arguments.lr), ("HypergradientDescent", tuned, median(lrs))):
        print(f"{name:22}{metrics['val_accuracy']:14.3f}{metrics['val_loss']:12.3f}{arguments.lr:12.1e}{lr:12.1e}")
    print(f"\nThe curves: tensorboard --logdir {logs}")


if __name__ == "__main__":
    main()
