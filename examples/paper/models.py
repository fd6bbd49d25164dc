"""The networks of the paper's experiments."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

CLASSES = 10
HIDDEN = 1000
VGG_16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
"""The channels of the convolutions; 0 is a pooling layer, which halves height and width."""


class Standardize(nn.Module):
    """Bytes to numbers of mean 0 and variance 1 over the training set, channel by channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        var, mean = torch.var_mean(images.float(), dim=(0, 2, 3), keepdim=True)
        self.register_buffer("mean", mean[0])
        self.register_buffer("std", var[0].sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Standardized images."""
        return (x.float() - self.mean) / self.std


def make_network(name: str, images: Tensor, width: float = 1.0) -> nn.Module:
    """A network that takes images as bytes.

    Args:
        name: ``logreg``: logistic regression; ``mlp``: two hidden layers of 1,000 units; ``vgg``: VGG-16.
        images: Those to train with, for their shape, mean and variance.
        width: What the number of channels of the VGG is multiplied with.
    """
    channels, *size = images.shape[1:]
    pixels = channels * math.prod(size)
    body = {
        "logreg": lambda: nn.Sequential(nn.Flatten(), nn.Linear(pixels, CLASSES)),
        "mlp": lambda: nn.Sequential(
            *(nn.Flatten(), nn.Linear(pixels, HIDDEN), nn.ReLU()),
            *(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)),
        ),
        "vgg": lambda: vgg(channels, [math.ceil(width * each) for each in VGG_16]),
    }[name]()
    return nn.Sequential(Standardize(images), body)


def vgg(channels: int, widths: Sequence[int]) -> nn.Sequential:
    """Convolutions with batch norm, then three fully connected layers with dropout, for images of 32 × 32."""
    layers: list[nn.Module] = []
    for width in widths:
        if width:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        else:
            layers += [nn.MaxPool2d(2)]
    for _ in range(2):
        layers += [nn.Dropout(), nn.Linear(channels, channels), nn.ReLU()]
    return nn.Sequential(*layers[:-6], nn.Flatten(), *layers[-6:], nn.Linear(channels, CLASSES))
