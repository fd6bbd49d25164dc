"""What the documentation says is supported: each combination is tried; each test and error that it names exists."""

import ast
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, LightningModule, callbacks
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import SGD, Adam, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from lightning_hd import HypergradientDescent
from tests.distributed.processes import run, tell_lightning
from tests.distributed.training import OPTIMIZERS, network
from tests.test_callback import make_trainer

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="gloo processes are spawned with POSIX semantics"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "supported.md"
STRATEGIES = {
    "one device": None,
    "`DDPStrategy`": DDPStrategy,
    "`ModelParallelStrategy` (`fully_shard`)": lambda: ModelParallelStrategy(2, 1),
}
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-true")


class AnyDtype(LightningModule):
    """A network that takes its inputs in its own dtype."""

    def __init__(self, name: str = "Adam") -> None:
        super().__init__()
        self.name = name
        self.network = network("alone", 7).float()

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.network, FSDPModule):
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].to(next(self.parameters()).dtype)
        loss: Tensor = (self.network(x) - x[:, :3].sin()).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.name](self.parameters())
        if next(self.parameters()).dtype == torch.float16:
            for group in optimizer.param_groups:
                group["eps"] = 1e-4  # that of the default is 0 in half precision, and so are squares of gradients
        return optimizer

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(64, 5, generator=torch.Generator().manual_seed(0))), batch_size=8)


class Validated(AnyDtype):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    val_dataloader = AnyDtype.train_dataloader


class TwoGroups(AnyDtype):
    def configure_optimizers(self) -> Any:
        p = list(self.parameters())
        return Adam([{"params": p[:2], "lr": 1e-3}, {"params": p[2:], "lr": 2e-3}])


class Scheduled(AnyDtype):
    def configure_optimizers(self) -> Any:
        optimizer = Adam(self.parameters())
        schedule = lr_scheduler.CosineAnnealingLR(optimizer, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Manual(AnyDtype):
    """Two optimizers that step in turn, the first twice a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        first, second = self.optimizers()  # type: ignore[attr-defined]
        for optimizer in (first, first, second):
            self.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        p = list(self.parameters())
        return [Adam(p[:2]), SGD(p[2:], lr=0.01)]


class Compiled(AnyDtype):
    def configure_model(self) -> None:
        super().configure_model()
        self.network.compile(backend="eager")


class Feature(NamedTuple):
    """What is used beside the callback, and its arguments."""

    module: Callable[[], AnyDtype] = AnyDtype
    trainer: dict[str, Any] = {}  # noqa: RUF012
    hd: dict[str, Any] = {}  # noqa: RUF012
    callback: Callable[[], Callback] | None = None
    moves: float = 1.0  # the first part of the steps, in which rates must move


FEATURES = {
    "the paper's rules": Feature(hd={"rule": "multiplicative"}),
    '`scope="group"`': Feature(TwoGroups, hd={"scope": "group"}),
    "a scheduler": Feature(Scheduled),
    "accumulated batches": Feature(trainer={"accumulate_grad_batches": 3}),
    "clipping by norm": Feature(trainer={"gradient_clip_val": 0.1}),
    "clipping by value": Feature(trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "manual optimization, two optimizers": Feature(
        Manual,
        moves=0.75,  # later a rate rests while nothing asks for a change
    ),
    "validation in mid-epoch": Feature(Validated, {"val_check_interval": 3, "limit_val_batches": 2}),
    "`torch.compile` of a module": Feature(Compiled),
    "`GradientAccumulationScheduler`": Feature(callback=lambda: callbacks.GradientAccumulationScheduler({0: 1, 1: 2})),
    "`StochasticWeightAveraging`": Feature(
        callback=lambda: callbacks.StochasticWeightAveraging(1e-3, 2),
        moves=0.5,  # then the rates are those of averaging
    ),
    "`EMAWeightAveraging`": Feature(callback=lambda: callbacks.EMAWeightAveraging()),
    "`LearningRateFinder`": Feature(
        callback=lambda: callbacks.LearningRateFinder(num_training_steps=5, update_attr=False)
    ),
}


def fit(folder: Path, strategy: str, feature: Feature, precision: Any, tuned: bool) -> dict[str, list[float]]:
    arguments: dict[str, Any] = {"precision": precision, "max_epochs": 2, "limit_val_batches": 0, **feature.trainer}
    make = STRATEGIES[strategy]
    if make is not None:
        arguments |= {"strategy": make(), "devices": 2, "plugins": [TorchElasticEnvironment()]}
    hd = HypergradientDescent(**feature.hd)
    others = [feature.callback()] if feature.callback else []
    make_trainer(folder, *([hd] if tuned else []), *others, **arguments).fit(feature.module())
    return hd.lrs


def error_of(run: Callable[[], Any]) -> str:
    """The last line of the error that it raises, or nothing."""
    try:
        run()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # such as torch's CheckpointException
        return (str(error).strip() or type(error).__name__).splitlines()[-1]
    return ""


def attempt(folder: Path, strategy: str, feature: Feature, precision: Any = "32-true") -> tuple[str, Any]:
    """What comes of a short training: "yes" where the rates of all steps are finite and move, else why; the rates."""
    lrs: dict[str, list[float]] = {}
    if error := error_of(lambda: lrs.update(fit(folder, strategy, feature, precision, tuned=True))):
        without = error_of(lambda: fit(folder, strategy, feature, precision, tuned=False))
        return f"no: {'without the callback as well: ' if without == error else ''}{error}", None
    # In 16 bit, the first moves may round to what asks for the lowest, then the highest change: a rate comes back.
    first = [own[: int(feature.moves * len(own))] for own in lrs.values()]
    moves = all(len(own) - 1 <= len(set(own)) > 3 for own in first)
    moves = moves and all(torch.tensor(own).isfinite().all() for own in lrs.values())
    return "yes" if lrs and moves else f"no: its rates are {lrs}", lrs


Key = tuple[str, str, str]
"""Strategy, precision, and an optimizer or a feature."""


def attempt_all(folder: Path, keys: Sequence[Key]) -> dict[Key, tuple[str, Any]]:
    if dist.is_initialized():
        tell_lightning()
    return {
        (strategy, precision, what): attempt(
            folder, strategy, FEATURES.get(what) or Feature(partial(AnyDtype, what)), precision
        )
        for strategy, precision, what in keys
    }


def outcomes(folder: Path, keys: Sequence[Key]) -> dict[Key, str]:
    """What comes of each; on two processes the same, with the same rates, on both."""
    first, second = run(attempt_all, 2, folder, [key for key in keys if STRATEGIES[key[0]]])
    assert not isinstance(first, Exception), first
    assert first == second
    alone = attempt_all(folder, [key for key in keys if not STRATEGIES[key[0]]])
    return {key: outcome for key, (outcome, _) in {**alone, **first}.items()}


def rows(head: str) -> list[list[str]]:
    """The cells of the table of the documentation with this head; notes stand in the place of their numbers."""
    blocks = PAGE.read_text().split("\n\n")
    (at,) = (i for i, block in enumerate(blocks) if block.startswith(f"| {head} |"))
    table, notes = blocks[at], "".join(blocks[at + 1 : at + 2])
    for number, note in re.findall(r"^\((\d+)\) (.*)$", notes, re.MULTILINE):
        table = table.replace(f"no ({number})", f"no: {note}")
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


def comparable(text: str) -> str:
    """Errors that are not the callback's are worded otherwise in other versions of Lightning and torch."""
    return re.sub(r"(without the callback as well): .*", r"\1", text)


@pytest.mark.parametrize("others", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_documentation_says_which_strategies_precisions_and_optimizers_work(others: bool, tmp_path: Path) -> None:
    """On one device with all optimizers, and on two processes with two; the slow test is of all others."""
    told = {
        (strategy, precision, name): cell
        for strategy, precision, *cells in rows(f"strategy | precision | {' | '.join(OPTIMIZERS)}")
        for name, cell in zip(OPTIMIZERS, cells, strict=True)
    }
    keys = list(product(STRATEGIES, PRECISIONS, OPTIMIZERS))
    assert list(told) == keys
    first = [key for key in keys if key[0] == "one device" or key[2] in ("heavy ball", "Adam")]
    tried = [key for key in keys if key not in first] if others else first
    for key, outcome in outcomes(tmp_path, tried).items():
        assert comparable(outcome) == comparable(told[key]), key


def test_the_documentation_says_which_features_work_with_which_strategies(tmp_path: Path) -> None:
    told = {
        (strategy, "32-true", what): cell
        for what, *cells in rows(f"Adam, 32-true | {' | '.join(STRATEGIES)}")
        for strategy, cell in zip(STRATEGIES, cells, strict=True)
    }
    keys = [(strategy, "32-true", what) for what in FEATURES for strategy in STRATEGIES]
    assert list(told) == keys
    for key, outcome in outcomes(tmp_path, keys).items():
        assert comparable(outcome) == comparable(told[key]), key


def test_the_tests_that_the_documentation_names_exist() -> None:
    named = rows("what | tests")
    assert len(named) > 20
    for _, where in named:
        for path, names in re.findall(r"`([\w/]+\.py)::([\w*]+)`", where):
            source = ast.parse((ROOT / "tests" / path).read_text())
            functions = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
            assert names in functions, f"{path}::{names}"
        assert "::" in where


def test_the_errors_that_the_documentation_names_are_those_of_the_package() -> None:
    literals = []
    for path in (ROOT / "lightning_hd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            literals.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in parts))
    refused = rows("what | error")
    assert len(refused) > 10
    for _, words in refused:
        assert any(words.strip("`") in literal for literal in literals), words
