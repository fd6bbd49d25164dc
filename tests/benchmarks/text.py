"""The standard library's source code: its characters, and its words."""

import functools
import re
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tests.benchmarks.problems import Problem
from tests.benchmarks.quadratic import sampler

CONTEXT = 32


@functools.cache
def module_text() -> str:
    """The first 40 modules of Python's standard library."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    return "".join(module.read_text(encoding="utf8", errors="ignore") for module in modules)


@functools.cache
def source_code() -> tuple[Tensor, int]:
    """The text as indices of characters, and how many characters there are."""
    raw = np.frombuffer(module_text().encode("ascii", "ignore"), np.uint8)
    characters, indices = np.unique(raw, return_inverse=True)
    return torch.from_numpy(indices).long(), len(characters)


class Block(nn.Module):
    """A transformer's block: causal attention and a network, each behind a layer norm, or before it (``post``)."""

    def __init__(self, width: int, heads: int, post: bool = False) -> None:
        super().__init__()
        self.post = post
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.network = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attend(x))
            y: Tensor = self.norm2(x + self.network(x))
            return y
        x = x + self.attend(self.norm1(x))
        y = x + self.network(self.norm2(x))
        return y

    def attend(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(batch, time, width))
        return out


class Transformer(nn.Module):
    """The logits of the next character, at every place."""

    def __init__(self, characters: int, width: int = 64, layers: int = 2, heads: int = 4, post: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, post) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(x) + self.position)))
        return logits


def language_model(seed: int, data: Path, post: bool = False) -> Problem:
    generator = sampler(seed)
    text, characters = source_code()
    network = Transformer(characters, post=post)
    held_out = len(text) // 10
    train = text[:-held_out].unfold(0, CONTEXT + 1, 1)
    val = text[-held_out:].unfold(0, CONTEXT + 1, CONTEXT + 1)
    val = val[:: len(val) // 512]

    def loss(network: nn.Module, windows: Tensor) -> Tensor:
        return F.cross_entropy(network(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def train_loss() -> Tensor:
        return loss(network, train[torch.randint(len(train), (24,), generator=generator)])

    return Problem(network, train_loss, lambda network: loss(network, val))


# ---------------------------------------------------------------------- words

WORDS, WINDOW = 2000, 4


@functools.cache
def words() -> Tensor:
    """The words of the same modules, as ranks by frequency; the rarer ones are left out."""
    found = re.findall(r"[A-Za-z_]+", module_text())
    names, counts = np.unique(np.array(found), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:WORDS]
    ranks = {str(names[index]): rank for rank, index in enumerate(order)}
    return torch.tensor([ranks[word] for word in found if word in ranks])


class WordVectors(nn.Module):
    """Skip-gram: how likely two words are neighbours is the product of their vectors."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.word = nn.Embedding(WORDS, width)
        self.context = nn.Embedding(WORDS, width)
        for embedding in (self.word, self.context):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, pairs: Tensor, others: Tensor) -> Tensor:
        word = self.word(pairs[0])
        near = (word * self.context(pairs[1])).sum(1)
        far = torch.einsum("bw,bkw->bk", word, self.context(others))
        return F.softplus(-near).mean() + F.softplus(far).sum(1).mean()


def word_vectors(seed: int, data: Path) -> Problem:
    """Pairs of near words against four random ones."""
    generator = sampler(seed)
    network, text = WordVectors(), words()
    held_out = len(text) // 10

    def draw(low: int, high: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        at = torch.randint(low, high - WINDOW, (count,), generator=generator)
        near = at + torch.randint(1, WINDOW + 1, (count,), generator=generator)
        drawn = torch.randint(len(text), (count, 4), generator=generator)
        return torch.stack([text[at], text[near]]), text[drawn]

    def train_loss() -> Tensor:
        loss: Tensor = network(*draw(0, len(text) - held_out, 512, generator))
        return loss

    val = draw(len(text) - held_out, len(text), 4096, torch.Generator().manual_seed(0))
    return Problem(network, train_loss, lambda network: network(*val))
