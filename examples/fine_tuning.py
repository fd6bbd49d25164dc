"""Pre-train on the digits 0 to 4, then fine-tune on 5 to 9, with the lower layers frozen at first.

python examples/fine_tuning.py

The lower layers join the optimizer later, as a second parameter group, with the rate of the first. They need no smaller
one (``initial_denom_lr=1``): where layers join, the callback starts anew from a small rate, which both groups share.
"""

import argparse
import logging
import warnings
from statistics import median

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BaseFinetuning
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from lightning_hd import HypergradientDescent


class Classifier(LightningModule):
    """Lower layers, and a last one that tells five digits apart."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.lower = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.last = nn.Linear(64, 5)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        x, y = batch
        return nn.functional.cross_entropy(self.last(self.lower(x)), y)

    def configure_optimizers(self) -> Optimizer:
        """Adam for what is not frozen."""
        return Adam((p for p in self.parameters() if p.requires_grad), lr=self.lr)


class Unfreeze(BaseFinetuning):
    """Freezes the lower layers until an epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze the lower layers."""
        self.freeze(pl_module.lower)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Add them to the optimizer, at the rate of the last layer."""
        if epoch == self.epoch:
            self.unfreeze_and_add_param_group(pl_module.lower, optimizer, initial_denom_lr=1)


def fit(module: Classifier, data: Dataset[tuple[Tensor, ...]], epochs: int, *callbacks: Callback) -> None:
    """Train once."""
    Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(module, DataLoader(data, batch_size=32, shuffle=True))


def main() -> None:
    """Pre-training, then all runs, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40, help="of fine-tuning (default: %(default)s)")
    epochs = parser.parse_args().epochs
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")

    seed_everything(0, verbose=False)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images, low = images.float() / 16, labels < 5
    trained = Classifier(lr=1e-3)
    fit(trained, TensorDataset(images[low], labels[low]), 15)
    train, val = random_split(TensorDataset(images[~low], labels[~low] - 5), [0.75, 0.25])
    print(f"{'':22}{'configured':>12}{'val accuracy':>14}{'val loss':>10}{'median lr':>11}{'last lr':>10}")
    for lr, hd in ((1e-4, None), (1e-3, None), (1e-2, None), (1e-4, HypergradientDescent())):
        seed_everything(0, verbose=False)
        module = Classifier(lr)
        module.lower.load_state_dict(trained.lower.state_dict())
        fit(module, train, epochs, Unfreeze(epochs // 4), *([hd] if hd else []))
        with torch.no_grad():
            x, y = val[:]
            logits = module.last(module.lower(x))
        accuracy, loss = (logits.argmax(1) == y).float().mean(), nn.functional.cross_entropy(logits, y)
        name, lrs = ("HypergradientDescent", hd.lrs["lr-Adam"]) if hd else ("constant", [lr])
        print(f"{name:22}{lr:12.0e}{accuracy:14.3f}{loss:10.3f}{median(lrs):11.1e}{lrs[-1]:10.1e}")


if __name__ == "__main__":
    main()
