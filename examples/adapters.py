"""Adapt a trained network to new data by low-rank adapters (LoRA, arXiv 2106.09685): only they are in the optimizer.

python examples/adapters.py

The network has learned scikit-learn's digits as they are; the new data are digits mirrored along their diagonal.
"""

import argparse
import logging
import warnings
from statistics import median

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from lightning_hd import HypergradientDescent


class LowRank(nn.Module):
    """Adds the product of two thin matrices to a weight: 0 at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.up = nn.Parameter(torch.zeros(rows, rank))
        self.down = nn.Parameter(torch.randn(rank, columns) / columns**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight."""
        return weight + self.up @ self.down


class Classifier(LightningModule):
    """A network of two hidden layers."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        hidden = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.network = nn.Sequential(*hidden, nn.Linear(64, 10))

    def add_adapters(self, rank: int) -> None:
        """Freeze the network, and give each weight an adapter."""
        self.network.requires_grad_(False)
        for layer in self.network:
            if isinstance(layer, nn.Linear):
                parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    def configure_optimizers(self) -> Optimizer:
        """Adam for what is not frozen."""
        return Adam((p for p in self.parameters() if p.requires_grad), lr=self.lr)


def fit(module: Classifier, data: Dataset[tuple[Tensor, ...]], epochs: int, hd: HypergradientDescent | None) -> None:
    """Train once."""
    Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[hd] if hd else [],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(module, DataLoader(data, batch_size=64, shuffle=True))


def main() -> None:
    """Pre-training, then all runs, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40, help="of adaptation (default: %(default)s)")
    epochs = parser.parse_args().epochs
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")

    seed_everything(0, verbose=False)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 16
    trained = Classifier(lr=1e-3)
    fit(trained, TensorDataset(images, labels), 15, None)
    mirrored = images.view(-1, 8, 8).transpose(1, 2).flatten(1)
    train, val = random_split(TensorDataset(mirrored, labels), [0.75, 0.25])
    print(f"{'':22}{'configured':>12}{'val accuracy':>14}{'val loss':>10}{'median lr':>11}{'last lr':>10}")
    for lr, hd in ((1e-4, None), (1e-3, None), (1e-2, None), (1e-4, HypergradientDescent())):
        seed_everything(0, verbose=False)
        module = Classifier(lr)
        module.load_state_dict(trained.state_dict())
        module.add_adapters(rank=4)
        fit(module, train, epochs, hd)
        with torch.no_grad():
            x, y = val[:]
            logits = module.network(x)
        accuracy, loss = (logits.argmax(1) == y).float().mean(), nn.functional.cross_entropy(logits, y)
        name, lrs = ("HypergradientDescent", hd.lrs["lr-Adam"]) if hd else ("constant", [lr])
        print(f"{name:22}{lr:12.0e}{accuracy:14.3f}{loss:10.3f}{median(lrs):11.1e}{lrs[-1]:10.1e}")


if __name__ == "__main__":
    main()
