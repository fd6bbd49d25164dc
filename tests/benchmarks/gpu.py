"""What tuning costs on a GPU, and what it learns there.

    python tests/benchmarks/gpu.py --out DIR                     # ten minutes on one GPU
    python tests/benchmarks/gpu.py --out DIR --device cpu --tiny # a minute, to see that it runs

The parts come in this order, and each line is written to ``DIR/gpu.md`` as soon as it is known: how often the host
waits for the device in a step; the table of ``cost.py``; whole training steps of three networks, eager and compiled,
with bfloat16 autocast; and a transformer that learns the standard library's source code, as bytes, with AdamW: at two
rates with warm-up and cosine, and with the rule "auto".
"""

import argparse
import copy
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TextIO

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import AdamW

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for those who run the file by its path

from lightning_hd import HypergradientLR
from tests.benchmarks.cost import counted_reads, measure, parameters, rows, timed
from tests.benchmarks.schedules import warm_cosine
from tests.benchmarks.text import Block, module_text

RATES = (3e-4, 1e-3)
"""Two common rates of AdamW."""

_CALM = 1_010
"""After so many steps without an event, "auto" looks at every eighth step."""


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    images: int  # in a batch
    side: int  # of an image
    width: int  # of the transformers
    layers: int
    context: int
    sequences: int  # in a batch
    timed: int  # steps that are timed
    learned: int  # steps of learning
    rows: int  # of the table of cost.py


FULL = Size(128, 224, 768, 12, 512, 8, 30, 1_500, 12)
TINY = Size(2, 32, 32, 1, 16, 2, 2, 4, 0)


class Language(nn.Module):
    """A causal transformer on bytes, as deep and wide as GPT-2 small at full size."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, size.width)
        self.position = nn.Parameter(torch.randn(size.context, size.width) * 0.02)
        self.blocks = nn.Sequential(*(Block(size.width, max(1, size.width // 64)) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, 256)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(x) + self.position)))
        return logits.flatten(0, 1)


class Bottleneck(nn.Module):
    """The block of a ResNet-50."""

    def __init__(self, inner: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = [(inner, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        layers: list[nn.Module] = []
        for a, b, kernel, step in sizes:
            layers += [nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.path = nn.Sequential(*layers[:-1])
        same = stride == 1 and inner == 4 * width
        self.short: nn.Module = nn.Identity() if same else nn.Conv2d(inner, 4 * width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.path(x) + self.short(x))


def resnet(blocks: Sequence[int]) -> nn.Module:
    """A ResNet with bottlenecks; 3, 4, 6 and 3 of them make a ResNet-50."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    inner = 64
    for i, count in enumerate(blocks):
        for j in range(count):
            layers.append(Bottleneck(inner, 64 << i, 2 if i and not j else 1))
            inner = 4 * (64 << i)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, 1000))


def small_cnn() -> nn.Module:
    """Three convolutions."""
    layers: list[nn.Module] = []
    for a, b in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1000))


def waits(step: Callable[[], object], device: str = "cuda") -> int:
    """How often the host waits for the device in a step. Without a GPU: how often it reads a number."""
    if device != "cuda":
        with counted_reads() as reads:
            step()
        return len(reads)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in seen)


def count_waits(out: TextIO, device: str, calm: int) -> None:
    """The waits of an early step, and of sixteen late ones."""
    optimizer = AdamW(parameters(10 * [(100,)], device), fused=True)
    HypergradientLR(optimizer, max_lr=1e-5)
    for _ in range(4):
        optimizer.step()
    early = waits(optimizer.step, device)
    for _ in range(calm):
        optimizer.step()
    late = [waits(optimizer.step, device) for _ in range(16)]
    print(f"waits for the device: {early} in an early step, {sum(late)} in 16 late ones\n", file=out, flush=True)


def training_steps(out: TextIO, device: str, size: Size) -> None:
    """Milliseconds of whole training steps without and with tuning, early and late."""
    images = torch.randn(size.images, 3, size.side, size.side, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (size.images,), device=device)
    tokens = torch.randint(256, (size.sequences, size.context), device=device)
    networks: dict[str, tuple[nn.Module, Tensor, Tensor]] = {
        "small CNN": (small_cnn(), images, labels),
        "ResNet-50": (resnet((3, 4, 6, 3) if size is FULL else (1, 1)), images, labels),
        "GPT-2 small": (Language(size), tokens, tokens.flatten()),
    }
    print("| network | way | plain, ms | tuned, early | tuned, late |\n|---|---|---|---|---|", file=out, flush=True)
    for name, (network, x, y) in networks.items():
        network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as torch documents it
        for way in ("eager", "compiled"):
            times = [_time(copy.deepcopy(network), x, y, way, tuned, size.timed) for tuned in (False, True)]
            (plain, _), (early, late) = times
            tuned_times = " | ".join(f"{own:.2f} ({own / plain:.3f})" for own in (early, late))
            print(f"| {name} | {way} | {plain:.2f} | {tuned_times} |", file=out, flush=True)


def _time(network: nn.Module, x: Tensor, y: Tensor, way: str, tuned: bool, count: int) -> tuple[float, float]:
    """The medians of early steps, and of steps that are looked at as seldom as late ones are."""
    optimizer = AdamW(network.parameters(), fused=True)
    engine = HypergradientLR(optimizer, max_lr=1e-5) if tuned else None
    backend = "inductor" if x.is_cuda else "eager"  # on a CPU this is to run, not to be fast
    forward = torch.compile(network, backend=backend) if way == "compiled" else network

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(forward(x).float(), y)
        loss.backward()  # type: ignore[no-untyped-call]
        if engine is not None:
            engine.observe(loss)
        optimizer.step()

    for _ in range(3):
        step()
    early = median(timed(step, x.device.type) for _ in range(count))
    if engine is None:
        return early, early
    gradients = [p.grad for p in network.parameters()]
    while engine.step_count < _CALM and count > 2:  # the same gradients again and again, so that it is soon over
        optimizer.step()
    assert all(p.grad is g for p, g in zip(network.parameters(), gradients, strict=True))
    begin = time.perf_counter()
    for _ in range(8 * math.ceil(count / 8)):
        timed(step, x.device.type)
    return early, 1e3 * (time.perf_counter() - begin) / (8 * math.ceil(count / 8))


def learn(out: TextIO, device: str, size: Size) -> None:
    """Losses of a transformer that learns source code."""
    text = torch.tensor(list(module_text().encode()), device=device)
    held_out = len(text) // 10
    train = text[:-held_out].unfold(0, size.context + 1, 1)
    val = text[-held_out:].unfold(0, size.context + 1, size.context + 1)[:64]

    def loss_of(network: nn.Module, windows: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return F.cross_entropy(network(windows[:, :-1]).float(), windows[:, 1:].flatten())

    print("\n| method | training loss | validation loss | seconds |\n|---|---|---|---|", file=out, flush=True)
    for rate in (*RATES, None):
        torch.manual_seed(0)
        network = Language(size).to(device)
        optimizer = AdamW(network.parameters(), lr=rate or 1e-3, weight_decay=0.1)
        engine = HypergradientLR(optimizer, total_steps=size.learned) if rate is None else None
        scheduler = None if rate is None else warm_cosine(optimizer, size.learned)
        generator, losses, begin = torch.Generator().manual_seed(1), [], time.perf_counter()
        for _ in range(size.learned):
            batch = train[torch.randint(len(train), (4 * size.sequences,), generator=generator).to(device)]
            optimizer.zero_grad()
            loss = loss_of(network, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if engine is not None:
                engine.observe(loss)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            losses.append(loss.detach())
        last = float(torch.stack(losses[-max(1, size.learned // 8) :]).mean())
        seconds = time.perf_counter() - begin
        with torch.no_grad():
            validation = float(loss_of(network.eval(), val))
        name = "auto" if rate is None else f"warm-up and cosine, {rate:g}"
        print(f"| {name} | {last:.4f} | {validation:.4f} | {seconds:.0f} |", file=out, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Write all parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks and few steps, to see that all parts run")
    arguments = parser.parse_args(argv)
    size = TINY if arguments.tiny else FULL
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "gpu.md").open("w", encoding="utf8") as out:
        count_waits(out, arguments.device, 4 if arguments.tiny else _CALM)
        for row in list(rows(quick=True))[: size.rows]:
            print(measure(row, 30, arguments.device), file=out, flush=True)
        training_steps(out, arguments.device, size)
        learn(out, arguments.device, size)
    print(f"written to {arguments.out / 'gpu.md'}")


if __name__ == "__main__":
    main()
