"""Pictures of clothes: Fashion-MNIST, where Debian's package has put it."""

import functools
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tests.benchmarks.problems import Labelled, Problem, mlp, supervised
from tests.benchmarks.quadratic import sampler

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""


class Scaled(nn.Module):
    """Bytes to numbers between 0 and 1: images are kept as bytes, a quarter of the memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 255


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


def classifier(seed: int, data: Path, widths: Sequence[int]) -> Problem:
    """A network with ReLUs; logistic regression where there are no units between."""
    generator = sampler(seed)
    return supervised(nn.Sequential(Scaled(), *mlp(*widths)), *fashion(data), 128, generator)


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


def fashion_large(seed: int, data: Path) -> Problem:
    """1.2 M parameters."""
    generator = sampler(seed)
    return supervised(nn.Sequential(Scaled(), *mlp(784, 1024, 384, 10)), *fashion(data), 64, generator)
