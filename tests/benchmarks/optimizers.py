"""How every optimizer of torch.optim, pytorch_optimizer and timm.optim fares with the engine, at its own defaults.

    pip install -e ".[bench]" pytorch_optimizer timm
    python tests/benchmarks/optimizers.py                   # 6 to 10 minutes
    python tests/benchmarks/optimizers.py --only AdamW

A small network classifies scikit-learn's digits. Three things are checked of each optimizer:

============== =========================================================================================================
exact          A rule that does nothing leaves the parameters as they are without the engine, bit for bit. "random":
               they are not even the same in two runs without it.
hypergradient  That of the paper's rules is the derivative of the next loss with respect to the rate of the last step,
               by a central finite difference in float64. "told": it is not, and a warning has said so. The error is
               the largest one of some steps, over the largest derivative.
auto           The training loss at the end is at most 1.1 times that of the best of three constant rates: the default
               rate, a tenth and ten times of it.
============== =========================================================================================================

An optimizer that cannot be built with defaults, or needs calls of its own, has a row that says why.
"""

import argparse
import contextlib
import csv
import importlib.util
import inspect
import math
import pkgutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for those who run the file by its path

from lightning_hd import HypergradientLR
from lightning_hd.optimizers import follow_rate
from tests.benchmarks.digits import split
from tests.benchmarks.problems import mlp, supervised
from tests.benchmarks.quadratic import sampler
from tests.benchmarks.training import switch_mode

PACKAGES = "torch.optim,pytorch_optimizer,timm.optim"
SECONDS = 60  # for one optimizer
EXACT_STEPS, COMPARED_STEPS, TRAINING_STEPS = 20, 12, 300
WIDTH = 1e-4  # of the finite difference, over the rate
TOLERANCE, WORSE = 1e-3, 1.1
FACTORS, USUAL_RATE = (0.1, 1.0, 10.0), 1e-3
NOTHING = {"rule": "additive", "hypergrad_lr": 0.0}  # leaves the rate as it is
CHECKED = ("exact", "hypergradient", "auto")
Make = Callable[[nn.Module], Optimizer]

SPECIAL = {  # why some are left out
    "needs a closure": ("AliG", "LBFGS"),
    "needs sparse gradients": ("SparseAdam",),
    "needs a backward pass with create_graph=True": ("AdaHessian", "Adahessian", "SophiaH"),
    "needs the model": ("AdaLOMO", "AdamMini", "LOMO"),
    "needs the number of steps": ("Ranger21",),
    "needs torch.distributed": ("DeMo", "DistributedMuon"),
    "needs two backward passes a step": ("BSAM", "FriendlySAM", "GSAM", "LookSAM", "SAM", "WSAM"),
    "wraps another one": ("Lookahead", "OrthoGrad", "PCGrad", "SafeFP16Optimizer", "ScheduleFreeWrapper", "TRAC"),
}


@dataclass
class Row:
    """What was found of one optimizer; empty where it was not looked at."""

    package: str
    optimizer: str
    exact: str = ""
    hypergradient: str = ""
    error: float = math.nan
    auto: str = ""
    ratio: float = math.nan
    constant_loss: float = math.nan
    constant_lr: float = math.nan
    auto_loss: float = math.nan
    auto_lr: float = math.nan
    note: str = ""

    def add(self, note: str) -> None:
        """Add to the note, in one line."""
        note = " ".join(note.split())[:300]
        self.note = "; ".join(dict.fromkeys(filter(None, (self.note, note))))


@cache
def modules_of(package: str) -> list[ModuleType]:
    """The modules that hold a package's optimizers."""
    try:
        return [importlib.import_module(package)]
    except ImportError:
        spec = importlib.util.find_spec("timm") if package == "timm.optim" else None
        if spec is None or not spec.submodule_search_locations:
            raise
    # The whole of timm needs torchvision, its optimizers do not: import them without what is above them.
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]
    folder = Path(spec.submodule_search_locations[0])
    for name, path in (("timm", folder), ("timm.optim", folder / "optim")):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    found = []
    for info in pkgutil.iter_modules([str(folder / "optim")], "timm.optim."):
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(info.name))
    return found


def classes_of(package: str) -> dict[str, Any]:
    """The optimizers of a package by name, without those that it has from another one."""
    return {
        name: cls
        for module in modules_of(package)
        for name, cls in sorted(vars(module).items())
        if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
        if cls.__module__.split(".")[0] == package.split(".")[0] and not name.startswith("_")
    }


def ways_to_build(cls: Any) -> Iterator[tuple[str, Make]]:
    """With defaults or a usual rate: for all parameters, or as those want it that are for matrices."""

    def select(network: nn.Module, matrices: bool) -> list[nn.Parameter]:
        return [p for p in network.parameters() if (p.dim() == 2) == matrices]

    def groups(network: nn.Module) -> list[dict[str, Any]]:
        return [{"params": select(network, use), "use_muon": use} for use in (True, False)]

    def make(params: Callable[[nn.Module], Any], settings: dict[str, float], network: nn.Module) -> Optimizer:
        return cls(params(network), **settings)  # type: ignore[no-any-return]

    for settings in ({}, {"lr": USUAL_RATE}):
        yield "", partial(make, lambda network: list(network.parameters()), settings)
    yield "matrices only", partial(make, partial(select, matrices=True), {})
    yield "two groups, of matrices and of others", partial(make, groups, {})


class Training:
    """A network, its batches, its optimizer and, where there is a rule, the engine; the same each time."""

    def __init__(self, make: Make, rule: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)  # some optimizers draw numbers
        np.random.seed(0)
        (x, y), _ = split()
        activation = nn.ReLU if dtype == torch.float32 else nn.Tanh  # without kinks, for the finite difference
        network = mlp(64, 32, 10, activation=activation).to(dtype)
        self.problem = supervised(network, (x.to(dtype), y), (x, y), 64, sampler(0))
        self.optimizer = make(network)
        switch_mode(self.optimizer, "train")
        self.engine = None if rule is None else HypergradientLR(self.optimizer, **rule)

    def scale_lr(self, factor: float) -> float:
        """Multiply all rates; returns the largest one before that."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
            follow_rate(self.optimizer, group, rate * factor)  # torch's ASGD has made its rate one step ahead
        return max(rates)

    def step(self) -> float:
        """One step; returns its loss."""
        self.optimizer.zero_grad()
        loss = self.problem.train_loss()
        loss.backward()
        if self.engine is not None:
            self.engine.observe(loss)
        self.optimizer.step()  # type: ignore[call-arg]
        return loss.item()

    def final_loss(self) -> float:
        """The mean over the last eighth of the steps; infinite where a loss is not finite."""
        losses = [0.0]
        while len(losses) <= TRAINING_STEPS and math.isfinite(losses[-1]):
            losses.append(self.step())
        return fmean(losses[-(TRAINING_STEPS // 8) :]) if math.isfinite(losses[-1]) else math.inf


def check_exact(row: Row, make: Make) -> None:
    """Whether the engine changes the training by nothing but the rate."""

    def trained(rule: dict[str, Any] | None) -> list[bytes]:
        training = Training(make, rule)
        for _ in range(EXACT_STEPS):
            training.step()
        return [p.detach().numpy().tobytes() for p in training.problem.network.parameters()]

    alone, again, tuned = trained(None), trained(None), trained(NOTHING)
    row.exact = "random" if alone != again else "ok" if alone == tuned else "NO"


def difference(make: Make, step: int) -> float:
    """The derivative of the loss after a step with respect to its rate, from the same training at two rates."""
    losses, rate = [], math.nan
    for sign in (1, -1):
        training = Training(make, dtype=torch.float64)
        for _ in range(step):
            training.step()
        rate = training.scale_lr(1 + sign * WIDTH)
        training.step()
        losses.append(training.problem.train_loss().item())
    return (losses[0] - losses[1]) / (2 * WIDTH * rate)


def check_hypergradient(row: Row, make: Make) -> None:
    """Whether the paper's rules see the derivative, or it is told that they do not."""
    torch.set_default_dtype(torch.float64)  # optimizers keep in it what they compute from step counts
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            training, seen = Training(make, NOTHING, torch.float64), []
            for _ in range(COMPARED_STEPS):
                training.step()
                seen += training.engine.last if training.engine is not None else []
        pairs = [(h.hypergradient, difference(make, step)) for step, h in enumerate(seen[1:]) if h is not None]
    finally:
        torch.set_default_dtype(torch.float32)
    said = any("linear" in text or "do not depend on the lr" in text for text in spoken(row, told))
    error, largest = (max(map(abs, v), default=0.0) for v in ([h - e for h, e in pairs], [e for _, e in pairs]))
    row.error = error / largest if largest else math.inf if error else 0.0
    row.hypergradient = "ok" if row.error <= TOLERANCE else "told" if said else "NO"


def spoken(row: Row, told: Sequence[warnings.WarningMessage]) -> list[str]:
    """What the engine has said, which is noted."""
    words = [str(warning.message) for warning in told if issubclass(warning.category, RuntimeWarning)]
    row.add("; ".join(text for text in words if text.startswith("HypergradientLR(")))
    return words


def check_auto(row: Row, make: Make) -> None:
    """Whether the default rule trains as well as the best of three constant rates."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        training = Training(make, {"rule": "auto"})
        row.auto_loss = training.final_loss()
    spoken(row, told)
    row.auto_lr = max(training.engine.lrs) if training.engine is not None else math.nan
    row.constant_loss = math.inf
    for factor in FACTORS:
        training = Training(make)
        rate = training.scale_lr(factor) * factor
        loss = training.final_loss()
        if loss < row.constant_loss:
            row.constant_loss, row.constant_lr = loss, rate
    row.ratio = row.auto_loss / row.constant_loss
    row.auto = "ok" if row.ratio <= WORSE else "worse"


class Late(BaseException):
    """The time of an optimizer is over; its own handlers of exceptions do not catch it."""


def find_way(row: Row, cls: Any) -> Make | None:
    """The first way in which the optimizer can be built, and takes steps without the engine."""
    reasons = [reason for reason, names in SPECIAL.items() if row.optimizer in names]
    for note, make in [] if reasons else ways_to_build(cls):
        try:
            Training(make).step()
        except Exception as error:
            reasons.append(f"without the engine: {type(error).__name__}: {error}")
        else:
            row.add(note)
            return make
    row.add(reasons[0])
    return None


def check(package: str, name: str, cls: Any) -> Row:
    """All that is checked of one optimizer; no error gets out."""
    row = Row(package, name)

    def ring(*_: object) -> None:
        raise Late(f"stopped after {SECONDS} seconds")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        make = find_way(row, cls)
        for column, function in zip(CHECKED, (check_exact, check_hypergradient, check_auto), strict=True):
            try:
                if make is not None:
                    function(row, make)
            except Exception as error:
                refused = str(error).startswith((f"optimizer {name} ", f"lr of {name} "))
                setattr(row, column, "refused" if refused else "error")
                row.add(f"{type(error).__name__}: {error}")
    except Late as error:
        row.add(str(error))
    finally:
        signal.alarm(0)
    return row


def report(rows: Sequence[Row]) -> str:
    """A table, and how often each outcome was found."""
    table = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in asdict(row).values()] for row in rows]
    table.insert(0, [field.name for field in fields(Row)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    for column in CHECKED:
        counts = Counter(getattr(row, column) or "not looked at" for row in rows)
        lines.append(f"{column}: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Check them all, write the CSV file, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--packages", default=PACKAGES, metavar="A,B", help="default: %(default)s")
    parser.add_argument("--only", metavar="NAME", help="one optimizer")
    parser.add_argument("--out", type=Path, default="runs/optimizers.csv", metavar="FILE", help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: list[tuple[str, str, Any]] = []
    for package in args.packages.split(","):
        try:
            found += [(package, name, cls) for name, cls in classes_of(package).items() if args.only in (None, name)]
        except ImportError as error:
            print(f"left out: {package}: {error}", file=sys.stderr)
    rows = list[Row]()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for case in tqdm(found, unit="optimizer"):
            rows.append(check(*case))
            writer.writerow(asdict(rows[-1]))
    print(report(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
