"""The house: imports go down from floor to floor, without a circle, and a step is read in a few files."""

import ast
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import lightning_hd
from lightning_hd import HypergradientLR

PACKAGE = Path(lightning_hd.__file__).parent

FLOORS = ["checks", "processes", "optimizers", "rules", "hypergradient", "engine", "reporting", "trainer"]
"""From the bottom to the top. The files beside them are above all: they are what users import and call."""

FILES = sorted(PACKAGE.rglob("*.py"))


def name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name(file): file for file in FILES}


def imports(source: str, package: str = "") -> Iterator[str]:
    """The modules that some code imports, wherever it does. ``from package import module`` is an import of that."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{package}: relative imports hide the arrows"
            assert node.module is not None
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from inside & MODULES.keys() or {node.module}


ARROWS = {module: set(imports(file.read_text(), module)) for module, file in MODULES.items()}


def floor(module: str) -> int:
    folder = f"{module}.".split(".")[1]
    return FLOORS.index(folder) if folder in FLOORS else len(FLOORS)


def own(modules: set[str]) -> set[str]:
    return {module for module in modules if module.split(".")[0] == "lightning_hd"}


@pytest.mark.parametrize("module", MODULES)
def test_no_arrow_goes_up(module: str) -> None:
    assert [other for other in own(ARROWS[module]) if floor(other) > floor(module)] == []


@pytest.mark.parametrize("module", MODULES)
def test_no_circle(module: str) -> None:
    # a folder's __init__ is imported with each file in it, but shows to other folders only
    reached, coming = set[str](), own(ARROWS[module])
    while coming:
        reached |= coming
        coming = own(set().union(*(ARROWS[other] for other in coming))) - reached
    assert module not in reached


@pytest.mark.parametrize("module", [m for m in MODULES if floor(m) < FLOORS.index("reporting")])
def test_the_floors_below_do_not_know_lightning(module: str) -> None:
    known = {other.split(".")[0] for other in ARROWS[module]}
    assert not known & {"lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics"}


@pytest.mark.parametrize("module", MODULES)
def test_other_folders_are_seen_through_their_front_doors(module: str) -> None:
    closed = [f"lightning_hd.{folder}." for folder in ("rules", "hypergradient", "engine")]
    passed = [
        other
        for other in own(ARROWS[module])
        for door in closed
        if other.startswith(door) and not f"{module}.".startswith(door)
    ]
    assert passed == []


def test_the_reader_of_imports_sees_all_kinds() -> None:
    code = "import os.path\ndef f():\n    from lightning_hd.engine import step, HypergradientLR\nfrom torch import nn"
    assert set(imports(code)) == {"os.path", "lightning_hd.engine.step", "torch"}
    with pytest.raises(AssertionError, match="relative"):
        list(imports("from . import step"))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_no_file_is_long(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 350


@pytest.mark.parametrize(("last", "files", "hops"), [(1203, 10, 16), (59, 12, 45)], ids=["ordinary", "with a look"])
def test_a_step_is_read_in_a_few_files(last: int, files: int, hops: int) -> None:
    entered: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            entered.append(frame.f_code.co_filename)

    torch.manual_seed(0)
    network = nn.Linear(9, 3)
    optimizer = SGD(network.parameters(), lr=0.1, momentum=0.9)
    hd = HypergradientLR(optimizer, max_lr=1e-5)  # so that gradients neither leap nor vanish
    batch = torch.randn(8, 9)
    for step in range(last + 1):
        loss = network(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        sys.setprofile(note if step == last else None)
        try:
            hd.observe(loss.detach())
            optimizer.step()
        finally:
            sys.setprofile(None)
    assert 0 < len(set(entered)) <= files
    assert sum(a != b for a, b in pairwise(entered)) <= hops
