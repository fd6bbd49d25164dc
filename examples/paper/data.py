"""Reads images in the file formats in which MNIST and CIFAR-10 are published."""

import gzip
import pickle
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
CIFAR_SHAPE = (3, 32, 32)
GZIP_MAGIC = b"\x1f\x8b"
UNSIGNED_BYTE = 8  # the type code in the header of an IDX file

Labelled: TypeAlias = tuple[Tensor, Tensor]
"""Images as bytes (number × channels × height × width), and their classes."""


class DataError(ValueError):
    """A file is missing, or is not what its name says. The message names it."""


@dataclass(frozen=True)
class Images:
    """A training set and a validation set.

    Args:
        source: Where they are from.
    """

    source: str
    train: Labelled
    val: Labelled


def find_images(folders: Sequence[Path], default: Path = FASHION) -> tuple[Images, Images]:
    """Gray images, and images of 32 × 32, which are those of CIFAR-10 where there are any, else the gray ones.

    Args:
        folders: Where to look for files in the formats of MNIST and CIFAR-10, also in the folders below.
        default: Where to look for gray images if they are not there. The last resort is scikit-learn's digits.

    Raises:
        DataError: A file is missing or damaged, several folders have such files, or ``folders`` have none.
    """
    gray, colour = _find_mnist(folders), _find_cifar(folders)
    if folders and gray is None and colour is None:
        wanted = f"{IDX_FILES[0]}, {CIFAR_FILES[0]} or {CIFAR_FILES[0]}.bin"
        raise DataError(f"there is no file {wanted} in {', '.join(map(str, folders))}")
    gray = gray or _find_mnist([default]) or digits()
    return gray, colour or as_large_as_cifar(gray)


def _find_mnist(folders: Sequence[Path]) -> Images | None:
    folder = _folder_of(folders, IDX_FILES[0], f"{IDX_FILES[0]}.gz")
    return read_mnist(folder) if folder else None


def _find_cifar(folders: Sequence[Path]) -> Images | None:
    if folder := _folder_of(folders, CIFAR_FILES[0]):
        return read_cifar(folder, pickled=True)
    folder = _folder_of(folders, f"{CIFAR_FILES[0]}.bin")
    return read_cifar(folder, pickled=False) if folder else None


def read_mnist(folder: Path) -> Images:
    """The four files of MNIST, or of any data in its format, compressed or not."""
    train_x, train_y, val_x, val_y = (read_idx(_either(folder, name, f"{name}.gz")) for name in IDX_FILES)
    for x, y in ((train_x, train_y), (val_x, val_y)):
        if x.dim() != 3 or y.dim() != 1 or len(x) != len(y):
            raise DataError(f"{folder} has images of the shape {tuple(x.shape)} and labels of {tuple(y.shape)}")
    return Images(str(folder), (train_x.unsqueeze(1), train_y.long()), (val_x.unsqueeze(1), val_y.long()))


def read_idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes, compressed or not."""
    content = path.read_bytes()
    if content.startswith(GZIP_MAGIC):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be decompressed: {error}") from error
    if content[:3] != bytes((0, 0, UNSIGNED_BYTE)) or len(content) < 4:
        raise DataError(f"{path} is not an IDX file of unsigned bytes: it begins with 0x{content[:4].hex()}")
    try:
        shape = struct.unpack_from(f">{content[3]}I", content, 4)
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (struct.error, ValueError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    return torch.from_numpy(array.copy())


def read_cifar(folder: Path, pickled: bool) -> Images:
    """The six files of CIFAR-10."""
    read, ending = (read_pickled, "") if pickled else (read_binary, ".bin")
    *train, val = (read(_either(folder, f"{name}{ending}")) for name in CIFAR_FILES)
    images, labels = zip(*train, strict=True)
    return Images(str(folder), (torch.cat(images), torch.cat(labels)), val)


def read_pickled(path: Path) -> Labelled:
    """A batch of CIFAR-10's Python version."""
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"], np.uint8), np.asarray(batch[b"labels"], np.int64)
        shaped = images.reshape(len(labels), *CIFAR_SHAPE)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a batch of CIFAR-10's Python version: {error!r}") from error
    return torch.from_numpy(shaped.copy()), torch.from_numpy(labels)


class _ArraysOnly(pickle.Unpickler):
    """A pickle can call any function; this one may make arrays only."""

    allowed = (
        *((module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
        *(("numpy", name) for name in ("ndarray", "dtype")),
        ("_codecs", "encode"),
    )

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in self.allowed:
            raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def read_binary(path: Path) -> Labelled:
    """A batch of CIFAR-10's binary version: a byte for the class before the bytes of each image."""
    content = np.fromfile(path, np.uint8)
    record = 1 + int(np.prod(CIFAR_SHAPE))
    if not len(content) or len(content) % record or content[::record].max() > 9:
        raise DataError(f"{path} is not a batch of CIFAR-10's binary version: it has no records of {record} bytes")
    records = torch.from_numpy(content.reshape(-1, record))
    return records[:, 1:].reshape(-1, *CIFAR_SHAPE), records[:, 0].long()


def digits() -> Images:
    """1,437 of scikit-learn's digits to train with and 360 to validate with."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images * 255 / 16, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, val_x = (torch.tensor(x, dtype=torch.uint8).view(-1, 1, 8, 8) for x in parts[:2])
    train_y, val_y = (torch.tensor(y) for y in parts[2:])
    return Images("digits", (train_x, train_y), (val_x, val_y))


def as_large_as_cifar(images: Images) -> Images:
    """Square images as often repeated, pixel by pixel, as fits into 32 × 32, and padded with 0."""

    def resized(x: Tensor) -> Tensor:
        x = x.repeat_interleave(32 // x.shape[-1], -1).repeat_interleave(32 // x.shape[-1], -2)
        left = (32 - x.shape[-1]) // 2
        right = 32 - x.shape[-1] - left
        return torch.nn.functional.pad(x, (left, right, left, right))

    train, val = images.train, images.val
    return Images(images.source, (resized(train[0]), train[1]), (resized(val[0]), val[1]))


def _folder_of(folders: Sequence[Path], *names: str) -> Path | None:
    found = sorted({path.parent for folder in folders for name in names for path in folder.rglob(name)})
    if len(found) > 1:
        raise DataError(f"several folders have a file {' or '.join(names)}: {', '.join(map(str, found))}")
    return found[0] if found else None


def _either(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} has no file {' or '.join(names)}")
