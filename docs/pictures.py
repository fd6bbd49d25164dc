"""Make the pictures of the documentation, from real runs. They are what ``python -m lightning_hd plot`` draws of these.

python docs/pictures.py            # all of them, into docs/pictures
python docs/pictures.py -o FOLDER climb braking

The networks are small: all runs together take a minute or two on one thread.
"""

import argparse
import logging
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_hd import Auto, HypergradientDescent
from lightning_hd.reporting import figure, load, save
from lightning_hd.reporting.plotting import COLUMN

ROOT = Path(__file__).resolve().parents[1]
COLORS = 64  # of a picture, so that its file is small

Configure: TypeAlias = Callable[[Iterator[nn.Parameter]], Any]
"""Makes what ``configure_optimizers`` returns."""


# ---------------------------------------------------------------------- data, networks, runs


@cache
def digits() -> TensorDataset:
    """Scikit-learn's 1797 digits, 8 by 8, in a random order, for they come writer by writer."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return TensorDataset(torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order])


@cache
def text() -> TensorDataset:
    """Source code of the standard library: eight characters, and the one that follows."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:20]
    characters = "".join(module.read_text(encoding="utf8", errors="ignore") for module in modules)
    windows = torch.tensor([min(ord(character), 127) for character in characters]).unfold(0, 9, 1)
    return TensorDataset(windows[:, :8], windows[:, 8])


def dense() -> nn.Module:
    """A network for the digits, of one hidden layer."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def reader() -> nn.Module:
    """A network for the text."""
    return nn.Sequential(nn.Embedding(128, 16), nn.Flatten(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128))


class Classifier(LightningModule):
    """Logs the loss of each step.

    Args:
        network: What is trained.
        configure: Makes what ``configure_optimizers`` returns.
        noise: Which part of the digits' labels is replaced by random ones, in training.
    """

    def __init__(self, network: nn.Module, configure: Configure, noise: float = 0.0) -> None:
        super().__init__()
        self.network = network
        self.configure = configure
        self.noise = noise

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        x, y = batch
        wrong = torch.rand(len(y)) < self.noise
        loss = F.cross_entropy(self.network(x), torch.where(wrong, torch.randint(10, y.shape), y))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """What the picture is about."""
        return self.configure(self.network.parameters())


class Validated(Classifier):
    """Logs the loss on data that it is not trained with as well, where the labels are right."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Cross entropy."""
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.network(x), y))


def fit(
    folder: Path,
    module: Callable[[], Classifier],
    data: TensorDataset,
    steps: int,
    hd: HypergradientDescent | None,
    batch: int = 64,
    val: TensorDataset | None = None,
) -> None:
    """Train once, with or without the callback, and leave the logs in the folder. Each run has the same seed."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[hd or LearningRateMonitor("step")],
        logger=TensorBoardLogger(folder.parent, name="", version=folder.name),
        log_every_n_steps=1 if steps < 300 else 2,
        val_check_interval=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    order = BatchSampler(RandomSampler(data, num_samples=steps * batch), batch, drop_last=False)
    validation = DataLoader(val, batch_size=len(val)) if val else None
    trainer.fit(module(), DataLoader(data, batch_size=None, sampler=order), validation)


# ---------------------------------------------------------------------- what is shown


def quickstart(folder: Path) -> None:
    """The runs of the example: without and with the callback."""
    example = str(ROOT / "examples" / "quickstart.py")
    subprocess.run([sys.executable, example, "--folder", str(folder)], check=True, stdout=subprocess.DEVNULL)


def climb(folder: Path) -> None:
    """From a configured rate that is far too small."""
    for name, hd in (("auto", HypergradientDescent(cooldown=0)), ("constant 1e-5", None)):
        fit(folder / name, lambda: Classifier(dense(), lambda p: SGD(p, lr=1e-5, momentum=0.9)), digits(), 150, hd)


def settled(folder: Path) -> None:
    """The same level from two starts."""
    for name, rule in (("auto", Auto()), ("auto, from 0.01", Auto(start="configured"))):
        hd = HypergradientDescent(rule, cooldown=0)
        fit(folder / name, lambda: Classifier(dense(), lambda p: SGD(p, lr=0.01), 0.2), digits(), 500, hd, batch=256)


def cooldown(folder: Path) -> None:
    """Where noise dominates, the rate falls by itself; by default, it falls in the last fifth in any case."""
    x, y = digits().tensors
    train, val = TensorDataset(x[:1400], y[:1400]), TensorDataset(x[1400:], y[1400:])
    for name, hd in (
        ("auto", HypergradientDescent()),
        ("auto, cooldown=0", HypergradientDescent(cooldown=0)),
        ("constant 0.5", None),
    ):
        fit(folder / name, lambda: Validated(dense(), lambda p: SGD(p, lr=0.5), 0.3), train, 800, hd, 16, val)


def schedule(folder: Path) -> None:
    """The rate is a schedule times what is learned."""

    def annealed(parameters: Iterator[nn.Parameter]) -> Any:
        optimizer = Adam(parameters, lr=1e-4)
        scheduler = CosineAnnealingLR(optimizer, 600)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    for name, hd in (("auto with the schedule", HypergradientDescent()), ("the schedule alone", None)):
        fit(folder / name, lambda: Classifier(reader(), annealed), text(), 600, hd)


def braking(folder: Path) -> None:
    """From a rate that is too high."""
    for name, hd in (
        ("auto, from 2", HypergradientDescent(Auto(start="configured"), cooldown=0)),
        ("constant 2", None),
    ):
        fit(folder / name, lambda: Classifier(dense(), lambda p: SGD(p, lr=2.0, momentum=0.9)), digits(), 150, hd)


def wrong(folder: Path) -> None:
    """Few data, all of them in each batch, so that the loss goes to 0; and a rule that is too slow."""
    few = TensorDataset(*(tensor[:256] for tensor in digits().tensors))
    for name, hd in (
        ("auto", HypergradientDescent()),
        ("auto, max_lr=0.01", HypergradientDescent(max_lr=0.01)),
        ("paper's additive", HypergradientDescent("additive")),
    ):
        fit(folder / name, lambda: Classifier(dense(), lambda p: Adam(p, lr=1e-5)), few, 800, hd, batch=256)


@dataclass(frozen=True)
class Picture:
    """One picture.

    Args:
        make: Makes the runs in a folder; the legend calls each by the name of its own.
        loss: The tag of the loss that is drawn; ``None``: that of the training.
        width: In inches.
    """

    make: Callable[[Path], None]
    loss: str | None = None
    width: float = COLUMN


PICTURES = {
    "quickstart": Picture(quickstart, width=5.5),
    "climb": Picture(climb),
    "settled": Picture(settled),
    "cooldown": Picture(cooldown, "val_loss"),
    "schedule": Picture(schedule),
    "braking": Picture(braking),
    "wrong": Picture(wrong),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all, {', '.join(PICTURES)}")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "pictures", help="default: docs/pictures")
    parsed = parser.parse_args(arguments)
    if unknown := set(parsed.names) - set(PICTURES):
        parser.error(f"there is no picture {', '.join(sorted(unknown))}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    parsed.output.mkdir(parents=True, exist_ok=True)
    for name in parsed.names or PICTURES:
        picture = PICTURES[name]
        with tempfile.TemporaryDirectory() as folder:
            picture.make(Path(folder))
            file = parsed.output / f"{name}.png"
            save(figure(load([folder], picture.loss), picture.width), file)
        # Half of 300 dpi: pages show pictures at their own size.
        Image.open(file).convert("RGB").reduce(2).quantize(COLORS).save(file, optimize=True)
        print(file)


if __name__ == "__main__":
    main()
