"""What the README says is supported: each combination is tried, each test that it names exists, as does each error."""

import ast
import os
import re
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_hd import HypergradientDescent
from tests.distributed.processes import run
from tests.distributed.training import OPTIMIZERS, network
from tests.test_callback import make_trainer

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="gloo processes are spawned with POSIX semantics"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]

ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = {
    "one device": None,
    "`DDPStrategy`": DDPStrategy,
    "`ModelParallelStrategy` (`fully_shard`)": lambda: ModelParallelStrategy(2, 1),
}
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-true")
Outcomes = dict[tuple[str, str, str], str]


class AnyDtype(LightningModule):
    """A network that takes its inputs in its own dtype."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.network = network("alone", 7).float()

    def configure_model(self) -> None:
        if self.device_mesh is not None:
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
        return DataLoader(TensorDataset(torch.randn(48, 5, generator=torch.Generator().manual_seed(0))), batch_size=8)


def attempt(folder: Path, strategy: str, precision: Any, name: str) -> str:
    """What comes of a short training: "yes" where the rates of all steps are finite and move, or an error."""
    arguments: dict[str, Any] = {"precision": precision, "max_epochs": 2}
    make = STRATEGIES[strategy]
    if make is not None:
        arguments |= {"strategy": make(), "devices": 2, "plugins": [TorchElasticEnvironment()]}
    hd = HypergradientDescent()
    try:
        make_trainer(folder, hd, **arguments).fit(AnyDtype(name))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"no: {error}"
    (lrs,) = hd.lrs.values()
    return "yes" if len(set(lrs)) == len(lrs) and torch.tensor(lrs).isfinite().all() else f"no: its rates are {lrs}"


def attempt_all(folder: Path, strategies: list[str]) -> Outcomes:
    if dist.is_initialized():
        rank, count = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count)
    return {case: attempt(folder, *case) for case in product(strategies, PRECISIONS, OPTIMIZERS)}


def table(outcomes: Outcomes) -> str:
    """The outcomes as the README has them, with a footnote for each error."""
    notes: list[str] = []
    lines = [f"| strategy | precision | {' | '.join(OPTIMIZERS)} |", "|---" * (2 + len(OPTIMIZERS)) + "|"]
    for strategy, precision in product(STRATEGIES, PRECISIONS):
        cells = []
        for name in OPTIMIZERS:
            outcome = outcomes[strategy, precision, name]
            if outcome != "yes" and outcome not in notes:
                notes.append(outcome)
            cells.append("yes" if outcome == "yes" else f"no ({notes.index(outcome) + 1})")
        lines.append(f"| {strategy} | {precision} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"({i}) {note[4:]}" for i, note in enumerate(notes, 1))])


def test_the_readme_tells_which_strategies_precisions_and_optimizers_work(tmp_path: Path) -> None:
    alone, *together = STRATEGIES
    first, second = run(attempt_all, 2, tmp_path, together)
    assert first == second
    expected = table({**attempt_all(tmp_path, [alone]), **first})
    assert expected in (ROOT / "README.md").read_text(), expected


def rows(heading: str) -> Iterator[list[str]]:
    """The cells of the table that follows a line of the README."""
    _, _, rest = (ROOT / "README.md").read_text().partition(f"\n{heading}\n")
    assert rest, heading
    lines = [line for line in rest.split("\n\n")[1].splitlines() if line.startswith("| ")]
    for line in lines[1:]:
        yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_tests_that_the_readme_names_exist() -> None:
    named = list(rows("### What is tested"))
    assert len(named) > 20
    for _, where in named:
        for path, names in re.findall(r"`([\w/]+\.py)::([\w*]+)`", where):
            source = ast.parse((ROOT / "tests" / path).read_text())
            functions = {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
            assert names in functions, f"{path}::{names}"
        assert "::" in where


def test_the_errors_that_the_readme_names_are_those_of_the_package() -> None:
    literals = []
    for path in (ROOT / "lightning_hd").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            literals.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in parts))
    refused = list(rows("### What is refused"))
    assert len(refused) > 10
    for _, words in refused:
        assert any(words.strip("`") in literal for literal in literals), words
