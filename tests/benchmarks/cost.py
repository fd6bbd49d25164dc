"""What tuning adds to a step of an optimizer, in time, memory, operations and host reads.

    python tests/benchmarks/cost.py                      # some 20 minutes on two cores, 8 GB
    python tests/benchmarks/cost.py --quick              # some rows, a minute
    python tests/benchmarks/cost.py --trainer            # whole training steps through a Trainer
    python tests/benchmarks/cost.py --tuners             # the steps of other tuners, of the extra ``bench``
    python tests/benchmarks/cost.py --device cuda        # on a GPU

Each row times the plain optimizer and the tuned one in turn, in one process, and gives the median of the ratios of
neighbouring steps, with the quartiles. The rule "auto" looks at each of its first steps, and at fewer later. So it has
the ratio of the times of the steps from 1,000 to 1,100, too. Parameters and gradients are random. Operations are those
that reach torch's dispatcher in an early step, without those that only make views. Host reads are those of them that
wait for a number.
"""

import argparse
import contextlib
import copy
import functools
import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for those who run the file by its path

from lightning_hd import HypergradientLR
from tests.benchmarks.training import switch_mode

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": functools.partial(SGD, lr=1e-3),
    "heavy ball": functools.partial(SGD, lr=1e-3, momentum=0.9),
    "Nesterov": functools.partial(SGD, lr=1e-3, momentum=0.9, nesterov=True),
    "Adam": Adam,
    "AdamW": AdamW,
    "RMSprop": functools.partial(RMSprop, lr=1e-3),
}
RULES = ("additive", "multiplicative", "auto")
_LATE = (1000, 1100)
"""The steps whose ratio is called late."""
Shapes = Sequence[tuple[int, ...]]


def resnet50() -> Shapes:
    """The 161 tensors of a ResNet-50, 25.6 M numbers."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inner = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, inner, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                shapes += [(4 * width, inner, 1, 1), (4 * width,), (4 * width,)]
            inner = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> Shapes:
    """The 148 tensors of GPT-2 small, 124 M numbers."""
    block: list[tuple[int, ...]] = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,)]
    block += [(3072, 768), (3072,), (768, 3072), (768,)]
    return [(50257, 768), (1024, 768), *(12 * block), (768,), (768,)]


MODELS: dict[str, Shapes] = {
    "1e5 in 10": 10 * [(10_000,)],
    "1 M in 15": 15 * [(256, 273)],
    "1,000 of 1,024": 1000 * [(1024,)],
    "5,000 of 1,024": 5000 * [(1024,)],
    "25.2 M in 24": 24 * [(1024, 1024)],
    "ResNet-50": resnet50(),
    "GPT-2 small": gpt2(),
    "1e8 in 96": 96 * [(1024, 1018)],
}
WAYS: dict[str, dict[str, Any]] = {"fused": {"fused": True}, "foreach": {"foreach": True}, "plain": {}}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    optimizer: str
    way: str
    model: str
    rule: Any
    probe: int | str | None = "default"


def rows(quick: bool) -> Iterator[Row]:
    """The lines that are asked for most, then each optimizer with each rule."""
    asked = [
        ("Adam", "fused", "25.2 M in 24"),
        ("SGD", "fused", "25.2 M in 24"),
        ("Adam", "fused", "1 M in 15"),
        ("Adam", "fused", "1,000 of 1,024"),
        ("Adam", "foreach", "1,000 of 1,024"),
        ("SGD", "plain", "5,000 of 1,024"),
    ]
    for optimizer, way, model in asked:
        for rule in ("additive", "auto"):
            yield Row(optimizer, way, model, rule)
    if quick:
        return
    for rule in ("additive", "auto"):
        yield Row("Adam", "fused", "1e8 in 96", rule)
        for model in ("ResNet-50", "GPT-2 small"):
            yield Row("AdamW", "fused", model, rule)
            yield Row("AdamW", "foreach", model, rule)
    yield Row("Adam", "fused", "25.2 M in 24", "auto", 2**20)
    for optimizer in OPTIMIZERS:
        for way in ("foreach",) if optimizer == "RMSprop" else ("fused", "foreach"):
            for model in ("1e5 in 10", "1 M in 15"):
                for rule in RULES:
                    yield Row(optimizer, way, model, rule)


def parameters(shapes: Shapes, device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator).to(device)
    return made


def timed(work: Callable[[], object], device: str = "cpu") -> float:
    """Milliseconds until the work is done, on a GPU too."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    work()
    wait()
    return 1e3 * (time.perf_counter() - begin)


VIEWS = {"_reshape_alias", "_unsafe_view", "detach", "split_with_sizes"}
"""Operations that make views and do not say so."""


class Counter(TorchDispatchMode):
    """Counts operations, but for those that make views."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += not func.is_view and func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


READS = ("item", "tolist", "__float__", "__int__", "__bool__", "numpy")
"""Methods of a tensor that wait for its numbers."""


@contextlib.contextmanager
def counted_reads() -> Iterator[list[str]]:
    """The host reads that are made meanwhile."""
    made: list[str] = []

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: Tensor, *args: Any) -> Any:
            made.append(name)
            return method(self, *args)

        return read

    with contextlib.ExitStack() as stack:
        for name in READS:
            stack.enter_context(mock.patch.object(Tensor, name, counting(name, getattr(Tensor, name))))
        yield made


def counted(work: Callable[[], object]) -> tuple[int, int]:
    """Operations and host reads."""
    with Counter() as counter, counted_reads() as reads:
        work()
    return counter.operations, len(reads)


def kept(engine: HypergradientLR, optimizer: Optimizer) -> int:
    """Bytes of the tensors that the engine keeps between two steps, beside those of the optimizer."""
    own = {x.untyped_storage().data_ptr() for x in everything(optimizer)}
    found: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen or value is optimizer:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = 0 if storage.data_ptr() in own else storage.nbytes()
        elif isinstance(value, (dict, list, tuple, set)):
            for item in value.values() if isinstance(value, dict) else value:
                visit(item)
        elif type(value).__module__.startswith("lightning_hd"):
            visit(vars(value))

    visit(engine)
    return sum(found.values())


def everything(optimizer: Optimizer) -> Iterator[Tensor]:
    """The tensors of the optimizer and its parameters."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield p
            if p.grad is not None:
                yield p.grad
    for state in optimizer.state.values():
        yield from (x for x in state.values() if isinstance(x, Tensor))


def measure(row: Row, rounds: int, device: str) -> str:
    """One line: medians, quartiles, operations, host reads, bytes kept."""
    plain, tuned = parameters(MODELS[row.model], device), parameters(MODELS[row.model], device)
    first, second = (OPTIMIZERS[row.optimizer](p, **WAYS[row.way]) for p in (plain, tuned))
    probe: Any = row.probe
    # The gradients are always the same, so rates that moved freely would leave the range of numbers.
    auto = row.rule == "auto"
    engine = HypergradientLR(second, row.rule, hypergrad_lr=None if auto else 0.0, probe=probe, max_lr=1e-3)
    for _ in range(3):
        first.step()
        second.step()

    def take(count: int) -> list[tuple[float, float]]:
        return [(timed(first.step, device), timed(second.step, device)) for _ in range(count)]

    pairs = take(rounds)
    ratios = [b / a for a, b in pairs]
    low, _, high = quantiles(ratios, n=4)
    own, alone = counted(second.step), counted(first.step)
    size = kept(engine, second)
    late = "–"
    if auto:
        while engine.step_count < _LATE[0]:
            second.step()
        plain_late, tuned_late = map(sum, zip(*take(_LATE[1] - _LATE[0]), strict=True))
        late = f"{tuned_late / plain_late:.2f}"
    numbers = sum(p.numel() for p in plain)
    label = "" if row.probe == "default" else f", probe {row.probe}"
    return (
        f"| {row.optimizer}, {row.way} | {row.model} | {row.rule}{label} | {median(a for a, _ in pairs):.2f} "
        f"| {median(b for _, b in pairs):.2f} | {median(ratios):.2f} | {low:.2f}–{high:.2f} | {late} "
        f"| {own[0] - alone[0]} | {own[1] - alone[1]} | {size / 2**20:.1f} | {size / numbers:.2f} |"
    )


def table(threads: int, quick: bool, only: str, device: str) -> None:
    torch.set_num_threads(threads)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{threads} thread{'s' if threads > 1 else ''}"
    print(f"\n{where}, times in ms per step\n")
    print(
        "| optimizer | parameters | rule | plain | tuned | ratio | quartiles | late | operations | host reads "
        "| MiB kept | bytes per parameter |"
    )
    print("|---" * 12 + "|")
    for row in rows(quick):
        if only in f"{row.optimizer} {row.way} {row.model} {row.rule}":
            numbers = sum(int(torch.Size(shape).numel()) for shape in MODELS[row.model])
            gc.collect()
            print(measure(row, max(7, min(101, int(3e8 / numbers))), device), flush=True)


# ---------------------------------------------------------------------- other tuners


def tuners() -> None:
    """The steps of other tuners over those of the fused optimizer that they wrap or replace."""
    from dadaptation import DAdaptAdam
    from mechanic_pytorch import mechanize
    from prodigyopt import Prodigy
    from prodigyplus.prodigy_plus_schedulefree import ProdigyPlusScheduleFree
    from schedulefree import AdamWScheduleFree

    def averaging(kind: Callable[[Any], Any], p: Sequence[Tensor]) -> Optimizer:
        optimizer: Optimizer = kind(p)
        switch_mode(optimizer, "train")
        return optimizer

    makers: dict[str, Callable[[Any], Optimizer]] = {
        "Prodigy": Prodigy,
        "Prodigy, slice_p=11": functools.partial(Prodigy, slice_p=11),
        "D-Adaptation": functools.partial(DAdaptAdam, lr=1.0),
        "Mechanic": lambda p: mechanize(Adam)(p, lr=1.0),  # type: ignore[no-any-return]
        "Schedule-Free": functools.partial(averaging, AdamWScheduleFree),
        "Prodigy + Schedule-Free": functools.partial(averaging, ProdigyPlusScheduleFree),
        "rule auto": lambda p: HypergradientLR(Adam(p, fused=True))._optimizer,
    }
    torch.set_num_threads(1)
    print("\nOther tuners, one thread, over a step of fused Adam and of foreach Adam\n")
    print("| tuner | parameters | ms per step | over fused | over foreach |")
    print("|---" * 5 + "|")
    for model in ("1 M in 15", "25.2 M in 24"):
        fused, foreach = (Adam(parameters(MODELS[model]), **WAYS[way]) for way in ("fused", "foreach"))
        for name, maker in makers.items():
            optimizer = maker(parameters(MODELS[model]))
            for _ in range(3):
                for o in (fused, foreach, optimizer):
                    o.step()
            times = [[timed(o.step) for o in (fused, foreach, optimizer)] for _ in range(15)]
            ratios = [median(own / time[i] for *time, own in times) for i in range(2)]
            print(f"| {name} | {model} | {median(own for *_, own in times):.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


# ---------------------------------------------------------------------- whole training steps


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Networks and the shapes of their inputs; they return ten logits."""

    def mlp(*widths: int) -> nn.Module:
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        return nn.Sequential(*[module for layer in layers for module in (layer, nn.ReLU())][:-1])

    convolutions = [3, 64, 128, 256, 512, 512]
    cnn = [
        module
        for a, b in itertools.pairwise(convolutions)
        for module in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
    ]
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, batch_first=True), 6, enable_nested_tensor=False
    )
    head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 384, 10))
    return {
        "MLP, 64×2": (mlp(64, 64, 64, 10), (64,)),
        "a run of it of 5,000 steps, logged": (mlp(64, 64, 64, 10), (64,)),
        "MLP, 60,000": (mlp(64, 256, 144, 10), (64,)),
        "MLP, 1e7": (mlp(784, 2400, 2400, 1000, 10), (784,)),
        "CNN, 4e6": (nn.Sequential(*cnn, nn.Flatten(), nn.Linear(512, 10)), (3, 32, 32)),
        "transformer, 1e7": (nn.Sequential(encoder, head), (16, 384)),
    }


def trainer(steps: int = 60) -> None:
    """Steps of a Trainer with the callback over those of one without it."""
    import logging
    import warnings

    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_hd import HypergradientDescent

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(LightningModule):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.network(x), y)

        def configure_optimizers(self) -> Optimizer:
            return AdamW(self.parameters())

    class Clock(Callback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.times.append(time.perf_counter())

    def fit(network: nn.Module, data: TensorDataset, callbacks: Sequence[Callback], logger: Any) -> list[float]:
        clock = Clock()
        run = Trainer(
            accelerator="cpu", callbacks=[clock, *callbacks], max_epochs=1, logger=logger,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        run.fit(Module(copy.deepcopy(network)), DataLoader(data, batch_size=64))
        return clock.times

    print("\nWhole training steps through the Trainer, AdamW, batch 64, all threads\n")
    print("| network | parameters | plain, ms | tuned, ms | ratio | lowest and highest of three |")
    print("|---" * 6 + "|")
    for name, (network, shape) in networks().items():
        whole = name.startswith("a run")
        count = 5_000 if whole else steps
        data = TensorDataset(torch.randn(64 * count, *shape), torch.randint(10, (64 * count,)))
        found = []
        for _ in range(3):
            own = []
            for callbacks in (list[Callback](), [HypergradientDescent()]):
                with tempfile.TemporaryDirectory() as folder:
                    times = fit(network, data, callbacks, CSVLogger(folder) if whole else False)
                mean = (times[-1] - times[0]) / (len(times) - 1)
                own.append(mean if whole else median(b - a for a, b in itertools.pairwise(times[5:])))
            found.append(own)
        ratios = sorted(b / a for a, b in found)
        plain, tuned = (1e3 * median(own[i] for own in found) for i in range(2))
        size = sum(p.numel() for p in network.parameters())
        print(
            f"| {name} | {size:,} | {plain:.2f} | {tuned:.2f} | {ratios[1]:.3f} | {ratios[0]:.3f}–{ratios[-1]:.3f} |",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the rows that are asked for most, one thread")
    parser.add_argument("--trainer", action="store_true", help="whole training steps only")
    parser.add_argument("--tuners", action="store_true", help="other tuners only")
    parser.add_argument("--only", default="", metavar="WORDS", help="rows whose description contains these")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the steps are taken")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda":
        table(1, arguments.quick, arguments.only, "cuda")
        return 0
    if not (arguments.trainer or arguments.tuners):
        threads = torch.get_num_threads()
        for count in (1,) if arguments.quick or threads == 1 else (1, threads):
            table(count, arguments.quick or count > 1, arguments.only, "cpu")
        torch.set_num_threads(threads)
    if arguments.tuners or not (arguments.quick or arguments.trainer or arguments.only):
        tuners()
    if arguments.trainer or not (arguments.quick or arguments.tuners or arguments.only):
        trainer()
    return 0


if __name__ == "__main__":
    sys.exit(main())
