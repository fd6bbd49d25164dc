"""Train on scikit-learn's digits from the command line, with the callback named in a configuration file.

python examples/cli.py fit --config examples/cli.yaml
python examples/cli.py fit --config examples/cli.yaml --trainer.callbacks null            # without it
python examples/cli.py fit --config examples/cli.yaml --trainer.callbacks.max_lr 0.01     # with another argument

It needs ``pip install "jsonargparse[signatures]"``.
"""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

Loader = DataLoader[tuple[Tensor, ...]]


class Classifier(LightningModule):
    """A network of one hidden layer.

    Args:
        lr: The learning rate that the optimizer is configured with.
    """

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        x, y = batch
        return nn.functional.cross_entropy(self.network(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Cross entropy and accuracy."""
        x, y = batch
        logits = self.network(x)
        self.accuracy(logits, y)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))
        self.log("val_accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam; any other optimizer does as well."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Digits(LightningDataModule):
    """Three quarters to train with, one to validate with.

    Args:
        batch_size: How many digits a step sees.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        images, labels = load_digits(return_X_y=True)
        data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
        self.train, self.val = random_split(data, [0.75, 0.25])

    def train_dataloader(self) -> Loader:
        """Shuffled."""
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> Loader:
        """All in one batch."""
        return DataLoader(self.val, batch_size=len(self.val))


def main() -> None:
    """What the command line says, and how good it is."""
    metrics = LightningCLI(Classifier, Digits).trainer.callback_metrics
    print(f"val accuracy {metrics['val_accuracy']:.3f}, val loss {metrics['val_loss']:.3f}")


if __name__ == "__main__":
    main()
