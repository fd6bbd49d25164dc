"""The learning problems: a network, the loss of its next batch, and a validation loss."""

import functools
import gzip
import itertools
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.benchmarks.quadratic import Quadratic, sampler

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""


@dataclass(frozen=True)
class Problem:
    """A task with a seed: what a training loop needs."""

    network: nn.Module
    train_loss: Callable[[], Tensor]  # of the next batch
    val_loss: Callable[[nn.Module], Tensor] | None = None  # of a network of that kind


@dataclass(frozen=True)
class Task:
    """A learning problem, up to the seed."""

    title: str
    steps: int
    build: Callable[[int, Path], Problem]
    files: tuple[str, ...] = ()  # that it needs in the directory of Fashion-MNIST

    def missing(self, data: Path) -> list[str]:
        """The files that are not there."""
        return [str(data / name) for name in self.files if not (data / name).exists()]


Labelled = tuple[Tensor, Tensor]


def batches(samples: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of batches, in a new order every epoch; an incomplete last batch is left out."""
    while True:
        order = torch.randperm(samples, generator=generator)
        yield from order[: samples - samples % size].split(size)


def supervised(
    network: nn.Module,
    train: Labelled,
    val: Labelled,
    size: int,
    generator: torch.Generator,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Problem:
    """Inputs and targets, in batches of ``size``."""
    x, y = train
    order = batches(len(x), size, generator)

    def train_loss() -> Tensor:
        batch = next(order)
        return criterion(network(x[batch]), y[batch])

    return Problem(network, train_loss, lambda network: criterion(network(val[0]), val[1]))


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with activations between them."""
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), activation())]
    return nn.Sequential(*layers[:-1])


class Scaled(nn.Module):
    """Bytes to numbers between 0 and 1: images are kept as bytes, a quarter of the memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 255


# ---------------------------------------------------------------------- scikit-learn's digits

HELD_OUT = 297


@functools.cache
def digits() -> Labelled:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def digits_problem(seed: int, data: Path, size: int | None) -> Problem:
    """64-64-10; ``size=None`` is the full batch."""
    generator = sampler(seed)
    x, y = digits()
    train, val = (x[:-HELD_OUT], y[:-HELD_OUT]), (x[-HELD_OUT:], y[-HELD_OUT:])
    return supervised(mlp(64, 64, 10), train, val, size or len(train[0]), generator)


# ---------------------------------------------------------------------- Fashion-MNIST


def idx(path: Path, header: int) -> Tensor:
    """The bytes of an IDX file, without its header."""
    return torch.from_numpy(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header).copy())


FASHION_FILES = tuple(
    f"{part}-{what}-ubyte.gz" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")
)


@functools.cache
def fashion(data: Path) -> tuple[Labelled, Labelled]:
    """The training set and the test set."""
    images, labels, test_images, test_labels = (
        idx(data / name, 16 if "images" in name else 8) for name in FASHION_FILES
    )
    return (images.view(-1, 784), labels.long()), (test_images.view(-1, 784), test_labels.long())


def fashion_mlp(seed: int, data: Path) -> Problem:
    generator = sampler(seed)
    return supervised(nn.Sequential(Scaled(), *mlp(784, 256, 256, 10)), *fashion(data), 128, generator)


def fashion_cnn(seed: int, data: Path) -> Problem:
    generator = sampler(seed)
    network = nn.Sequential(
        Scaled(),
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 5, 2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(400, 10),
    )
    return supervised(network, *fashion(data), 64, generator)


# ---------------------------------------------------------------------- the standard library's source, by characters

CONTEXT = 32


@functools.cache
def source_code() -> tuple[Tensor, int]:
    """The first 40 modules of Python's standard library as indices of characters, and how many characters there are."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    text = "".join(module.read_text(encoding="utf8", errors="ignore") for module in modules)
    characters, indices = np.unique(np.frombuffer(text.encode("ascii", "ignore"), np.uint8), return_inverse=True)
    return torch.from_numpy(indices).long(), len(characters)


class Block(nn.Module):
    """A transformer's block: causal attention and a network, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.network = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, time, width))
        y: Tensor = x + self.network(self.norm2(x))
        return y


class Transformer(nn.Module):
    """The logits of the next character, at every place."""

    def __init__(self, characters: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(x) + self.position)))
        return logits


def language_model(seed: int, data: Path) -> Problem:
    generator = sampler(seed)
    text, characters = source_code()
    network = Transformer(characters)
    held_out = len(text) // 10
    train = text[:-held_out].unfold(0, CONTEXT + 1, 1)
    val = text[-held_out:].unfold(0, CONTEXT + 1, CONTEXT + 1)
    val = val[:: len(val) // 512]

    def loss(network: nn.Module, windows: Tensor) -> Tensor:
        return F.cross_entropy(network(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def train_loss() -> Tensor:
        return loss(network, train[torch.randint(len(train), (24,), generator=generator)])

    return Problem(network, train_loss, lambda network: loss(network, val))


# ---------------------------------------------------------------------- regression, quadratic


def tanh_regression(seed: int, data: Path) -> Problem:
    """A deep network of tanh units learns the sine of a sum."""
    generator = sampler(seed)

    def sample(count: int, generator: torch.Generator) -> Labelled:
        x = torch.randn(count, 20, generator=generator)
        return x, torch.sin(x.sum(1, keepdim=True) / 2)

    train = sample(2000, generator)
    val = sample(2000, torch.Generator().manual_seed(seed + 2000))
    return supervised(mlp(20, *[50] * 6, 1, activation=nn.Tanh), train, val, 64, generator, F.mse_loss)


def quadratic(seed: int, data: Path) -> Problem:
    network = Quadratic(sampler(seed))
    return Problem(network, network)


TASKS = {
    "digits-16": Task("digits, batch 16", 800, functools.partial(digits_problem, size=16)),
    "digits-128": Task("digits, batch 128", 800, functools.partial(digits_problem, size=128)),
    "digits-full": Task("digits, full batch", 400, functools.partial(digits_problem, size=None)),
    "fashion-mlp": Task("Fashion-MNIST, MLP", 900, fashion_mlp, FASHION_FILES),
    "fashion-cnn": Task("Fashion-MNIST, CNN", 700, fashion_cnn, FASHION_FILES),
    "text": Task("source code, transformer", 400, language_model),
    "tanh": Task("regression, deep tanh", 1000, tanh_regression),
    "quadratic": Task("noisy quadratic", 2000, quadratic),
}


def build(name: str, seed: int, data: Path) -> Problem:
    """The task with that name, initialised by the seed."""
    torch.manual_seed(seed)
    return TASKS[name].build(seed, data)
