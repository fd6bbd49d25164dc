"""Many processes against one that sees the same global batches."""

import contextlib
import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from lightning_hd import HypergradientLR
from tests.distributed.processes import run
from tests.distributed.training import CASES, FEW_CASES, OPTIMIZERS, Case, Kind, Trained, network, train_all

STEPS = 100


@functools.cache
def alone(width: int) -> dict[Any, Trained]:
    return train_all("alone", list(dict.fromkeys(CASES + FEW_CASES)), STEPS, width)


class Way(NamedTuple):
    """A way to train, and how it places parameters."""

    kind: Kind
    processes: int
    width: int
    cases: list[Case]
    placements: set[str]


WAYS = [
    Way("ddp", 2, 7, CASES, set()),
    Way("ddp", 4, 7, FEW_CASES, set()),
    Way("sharded", 2, 7, CASES, {"Shard"}),
    Way("sharded", 4, 7, FEW_CASES[1::2], {"Shard"}),
    Way("hybrid", 4, 7, FEW_CASES[::2], {"Replicate", "Shard"}),
    Way("parallel", 2, 8, FEW_CASES, {"Replicate", "Shard", "_StridedShard"}),
    Way("both", 4, 8, FEW_CASES, {"Replicate", "Shard", "_StridedShard"}),
]


def train_ways(ways: list[Way]) -> list[dict[Case, Trained]]:
    return [train_all(way.kind, way.cases, STEPS, way.width) for way in ways]


@functools.cache
def trained_by(processes: int) -> list[Any]:
    """What each rank made of each way with that many processes, which are started once for all of them."""
    return run(train_ways, processes, [way for way in WAYS if way.processes == processes])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.kind}-{way.processes}")
def test_many_processes_tune_as_one_does(way: Way) -> None:
    ranks = trained_by(way.processes)
    for rank in ranks:
        assert not isinstance(rank, Exception), rank
    place = [other for other in WAYS if other.processes == way.processes].index(way)
    lrs = [{case: trained.lrs for case, trained in rank[place].items()} for rank in ranks]
    assert all(own == lrs[0] for own in lrs), "bit for bit"
    for case, trained in ranks[0][place].items():
        assert trained.placements == way.placements
        expected = alone(way.width)[case]
        np.testing.assert_allclose(trained.lrs, expected.lrs, rtol=1e-12, err_msg=str(case))
        for p, q in zip(trained.parameters, expected.parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


class Unused(nn.Module):
    """One layer of two has a gradient in each step, by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        self.turn += 1
        y: Tensor = self.layers[self.turn % 2](x)
        return y


def train_ddp(variant: str) -> list[float]:
    """The rates of 40 steps; two micro-batches each where gradients are accumulated."""
    torch.manual_seed(0)
    model: Any = Unused() if variant == "find unused" else nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3))
    model = model.double()
    if dist.is_initialized():
        model = DistributedDataParallel(
            model, find_unused_parameters=variant == "find unused", static_graph=variant == "static graph"
        )
        if variant == "fp16 hook":
            model.register_comm_hook(None, fp16_compress_hook)
        rank, count = dist.get_rank(), dist.get_world_size()
    else:
        rank, count = 0, 1
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    hd = HypergradientLR(optimizer)
    lrs = []
    for step in range(40):
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        halves = x.chunk(2) if variant == "accumulation" else (x,)
        for i, half in enumerate(halves):
            last = i == len(halves) - 1
            with contextlib.nullcontext() if last or count == 1 else model.no_sync():
                part = half.chunk(count)[rank]
                ((model(part) - part[:, :3].sin()).square().mean() / len(halves)).backward()
        optimizer.step()
        lrs += hd.lrs
    return lrs


VARIANTS = ("accumulation", "find unused", "static graph", "fp16 hook")


def train_variants() -> dict[str, list[float]]:
    return {variant: train_ddp(variant) for variant in VARIANTS}


def test_the_ways_to_use_ddp() -> None:
    first, second = run(train_variants, 2)
    assert first == second, "bit for bit"
    for variant, lrs in first.items():
        # half precision is what the hook asks for
        tolerance = 0.2 if variant == "fp16 hook" else 1e-12
        np.testing.assert_allclose(lrs, train_ddp(variant), rtol=tolerance, err_msg=variant)


def count_collectives() -> list[int]:
    counts = []
    kinds: list[Kind] = ["ddp", "sharded"]
    for kind, name, rule in itertools.product(kinds, OPTIMIZERS, ("auto", "additive")):
        model = network(kind, 8)
        optimizer = OPTIMIZERS[name](model.parameters())
        HypergradientLR(optimizer, rule=rule)
        for step in range(6):
            optimizer.zero_grad()
            model(torch.ones(4, 5, dtype=torch.float64)).square().mean().backward()
            with CommDebugMode() as mode:
                optimizer.step()
            if step >= 2:
                counts.append(mode.get_total_counts())
    return counts


def test_there_is_one_collective_a_step() -> None:
    for counts in run(count_collectives, 2):
        assert not isinstance(counts, Exception), counts
        assert len(counts) == 96
        assert set(counts) == {1}


def disagree(what: str) -> None:
    rank = dist.get_rank()
    p = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = SGD(p[: 1 + (what == "shapes" and rank == 1)], lr=0.1 * (1 + (what == "lrs" and rank == 1)))
    beta = 0.1 * (1 + (what == "rule" and rank == 1))
    scope: Any = "group" if what == "scope" and rank == 1 else "global"
    HypergradientLR(optimizer, rule="additive", hypergrad_lr=beta, scope=scope)
    p[0].grad = torch.ones(3)
    optimizer.step()


DISAGREEMENTS = ("rule", "scope", "lrs", "shapes")


def disagree_in_turn() -> list[str]:
    """What is told of each disagreement."""
    told = []
    for what in DISAGREEMENTS:
        with pytest.raises(RuntimeError) as error:
            disagree(what)
        told.append(str(error.value))
    return told


def test_processes_that_disagree_are_told_on_every_rank() -> None:
    for told in run(disagree_in_turn, 2):
        assert not isinstance(told, Exception), told
        for what, words in zip(DISAGREEMENTS, told, strict=True):
            assert f"the processes do not tune the same: {what}" in words


def drift() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.1)
    hd = HypergradientLR(optimizer, rule="additive")
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
    hd.check_agreement()
    optimizer.param_groups[0]["lr"] = 0.1 + 1e-9 * dist.get_rank()
    p.grad = torch.ones(3)
    optimizer.step()
    hd.check_agreement()


def test_rates_that_differ_are_found() -> None:
    for error in run(drift, 2):
        assert isinstance(error, RuntimeError)
        assert "internal error" in str(error)


def apart() -> list[float]:
    own = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SGD([p], lr=0.1 * (1 + dist.get_rank()))
    assert isinstance(own, dist.ProcessGroup)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0.01, process_group=own)
    for _ in range(2):
        p.grad = torch.full_like(p, 1.0 + dist.get_rank())
        optimizer.step()
    return hd.lrs


def test_models_that_train_apart_have_a_group_each() -> None:
    assert run(apart, 2) == [[pytest.approx(0.1 + 0.01 * 3)], [pytest.approx(0.2 + 0.01 * 12)]]


def test_a_process_group_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="process_group must be"):
        HypergradientLR(SGD([nn.Parameter(torch.ones(1))], lr=0.1), process_group=3)  # type: ignore[arg-type]
