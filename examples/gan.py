"""Train a GAN on scikit-learn's digits: two optimizers that step in turn, in manual optimization.

python examples/gan.py

The table has the Fréchet distance of the generated images from the real ones (smaller is better) and the last learning
rates. Neither gradients nor losses show that a rate is too high here, so each rule is tried with ``max_lr=``, too.
"""

import argparse
import logging
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hd import HypergradientDescent

NOISE, HIDDEN, PIXELS = 16, 128, 64
LR = 2e-4


class GAN(LightningModule):
    """A generator and a discriminator, of two hidden layers each, and an Adam for each."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            *(nn.Linear(NOISE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()),
            *(nn.Linear(HIDDEN, PIXELS), nn.Sigmoid()),
        )
        self.discriminator = nn.Sequential(
            *(nn.Linear(PIXELS, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(0.2)),
            nn.Linear(HIDDEN, 1),
        )

    def sample(self, count: int) -> Tensor:
        """Images that the generator makes of noise."""
        images: Tensor = self.generator(torch.randn(count, NOISE))
        return images

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        """One step of the discriminator, then one of the generator."""
        (real,) = batch
        for_discriminator, for_generator = self.optimizers()  # type: ignore[attr-defined]

        self.toggle_optimizer(for_discriminator)
        told_real = nn.functional.softplus(-self.discriminator(real)).mean()
        told_made = nn.functional.softplus(self.discriminator(self.sample(len(real)).detach())).mean()
        for_discriminator.zero_grad()
        self.manual_backward(told_real + told_made)
        for_discriminator.step()
        self.untoggle_optimizer(for_discriminator)

        self.toggle_optimizer(for_generator)
        seen_through = nn.functional.softplus(-self.discriminator(self.sample(len(real)))).mean()
        for_generator.zero_grad()
        self.manual_backward(seen_through)
        for_generator.step()
        self.untoggle_optimizer(for_generator)

        self.log_dict({"discriminator_loss": told_real + told_made, "generator_loss": seen_through})

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The rate and the betas that are usual for GANs."""
        networks = (self.discriminator, self.generator)
        return [torch.optim.Adam(network.parameters(), lr=LR, betas=(0.5, 0.999)) for network in networks]


@torch.no_grad()
def distance(images: Tensor, others: Tensor) -> float:
    """The Fréchet distance of two sets of images, pixels taken as normally distributed: of means and covariances."""
    a, b = (torch.cov(x.double().T) for x in (images, others))
    overlap = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    between = (images.double().mean(0) - others.double().mean(0)).square().sum()
    return float(between + a.trace() + b.trace() - 2 * overlap)


def fit(name: str, images: Tensor, epochs: int, logs: Path, callback: HypergradientDescent | None) -> float:
    """Train once; returns the distance between the images that the generator makes and the real ones."""
    seed_everything(0, verbose=False)
    module = GAN()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback] if callback else [],
        logger=TensorBoardLogger(logs, name=f"gan/{name}"),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(images), batch_size=64, shuffle=True, drop_last=True))
    return distance(module.sample(len(images)), images)


def main() -> None:
    """All runs, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="folder of the event files (default: runs)")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    torch.set_num_threads(1)  # the networks are small

    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    runs = {
        "without": None,
        "auto": HypergradientDescent(),
        "auto-clamped": HypergradientDescent(max_lr=3e-3),
        "multiplicative": HypergradientDescent("multiplicative"),
        "multiplicative-clamped": HypergradientDescent("multiplicative", max_lr=1e-3),
    }
    print(f"\n{'':24}{'distance':>10}{'last lr: discriminator':>24}{'generator':>11}")
    seed_everything(0, verbose=False)
    print(f"{'untrained':24}{distance(GAN().sample(len(images)), images):10.2f}")
    for name, callback in runs.items():
        reached = fit(name, images, arguments.epochs, arguments.folder, callback)
        rates = [lrs[-1] for lrs in callback.lrs.values()] if callback else [LR, LR]
        print(f"{name:24}{reached:10.2f}{rates[0]:24.1e}{rates[1]:11.1e}")
    print(f"\nThe distance of one half of the digits from the other: {distance(images[::2], images[1::2]):.2f}")
    print(f"The curves: tensorboard --logdir {arguments.folder / 'gan'}")


if __name__ == "__main__":
    main()
