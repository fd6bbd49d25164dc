"""How well the rule "auto" does with probes of other sizes, on transformers of some million parameters.

    python tests/benchmarks/probe.py                        # 1.4 M parameters, ten minutes on two cores
    python tests/benchmarks/probe.py --width 512 --layers 4 --steps 120   # 1e7 parameters, half an hour

The model learns the standard library's source code by characters. The table has the mean training loss over the last
eighth of the steps, and the last rate, for each size of the probe; beside it, the same for constant rates.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median

import torch
from torch.nn import functional as F  # noqa: N812
from torch.optim import SGD, AdamW, Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for those who run the file by its path

from lightning_hd import HypergradientLR
from tests.benchmarks.text import CONTEXT, Transformer, source_code

PROBES: tuple[int | None, ...] = (None, 2**18, 2**16, 2**14)
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": AdamW,
    "Nesterov": lambda p, lr: SGD(p, lr, momentum=0.9, nesterov=True),
}
RATES = {"AdamW": (3e-4, 1e-3, 3e-3), "Nesterov": (0.03, 0.1, 0.3)}


def train(
    width: int, layers: int, steps: int, name: str, lr: float, probe: int | None, tuned: bool, seed: int
) -> tuple[float, float]:
    """Mean loss over the last eighth of the steps, and the last rate."""
    torch.manual_seed(seed)
    text, characters = source_code()
    windows = text.unfold(0, CONTEXT + 1, 1)
    network = Transformer(characters, width, layers)
    optimizer = OPTIMIZERS[name](network.parameters(), lr=lr)
    hd = HypergradientLR(optimizer, probe=probe) if tuned else None
    losses = []
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (24,))]
        optimizer.zero_grad()
        loss = F.cross_entropy(network(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return fmean(losses[-(steps // 8) :]), hd.lrs[0] if hd else lr


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=192, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=250, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--constant", action="store_true", help="constant rates, too")
    arguments = parser.parse_args(argv)
    size = (arguments.width, arguments.layers, arguments.steps)
    count = sum(p.numel() for p in Transformer(source_code()[1], *size[:2]).parameters())
    print(f"{count:,} parameters, {arguments.steps} steps, {arguments.seeds} seed(s)\n")
    print("| optimizer | rate | probe | training loss | last rate |\n|---|---|---|---|---|")
    for name in OPTIMIZERS:
        ways = [("auto", 1e-3, probe, True) for probe in PROBES]
        ways += [("constant", lr, None, False) for lr in RATES[name] if arguments.constant]
        for way, lr, probe, tuned in ways:
            found = [train(*size, name, lr, probe, tuned, seed) for seed in range(arguments.seeds)]
            loss, last = (median(numbers) for numbers in zip(*found, strict=True))
            shown = "" if not tuned else "all" if probe is None else f"{probe:,}"
            print(f"| {name} | {way} | {shown} | {loss:.4f} | {last:.2g} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
