"""Many processes against one that sees the same global batches."""

import contextlib
import copy
import functools
import math
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from lightning_hd import Additive, HypergradientDescent, HypergradientLR
from lightning_hd.rules import inverse_square
from lightning_hd.trainer.attachment import TrainerEngine
from tests.distributed.processes import run
from tests.distributed.training import CASES, OPTIMIZERS, Case, Kind, Trained, network, train
from tests.pairs import covering
from tests.test_callback import Reference, make_trainer, same

STEPS = 10


@functools.cache
def alone(width: int) -> dict[Case, Trained]:
    return train("alone", CASES, STEPS, width)


class Way(NamedTuple):
    """A way to train, how it places parameters, and the optimizers: all with DDP, each with a way to shard."""

    kind: Kind
    processes: int
    width: int
    placements: set[str]
    optimizers: Sequence[str] = tuple(OPTIMIZERS)

    @property
    def cases(self) -> list[Case]:
        return [case for case in CASES if case[0] in self.optimizers]


FOUR = ("Nesterov", "Adam")
WAYS = [
    Way("ddp", 2, 7, set()),
    Way("ddp", 4, 7, set(), FOUR),
    Way("sharded", 2, 7, {"Shard"}, ("Nesterov", "AdamW", "RMSprop")),
    Way("sharded", 4, 7, {"Shard"}, ("heavy ball", "Adam")),
    Way("hybrid", 4, 7, {"Replicate", "Shard"}, ("SGD", "AdamW")),
    Way("parallel", 2, 8, {"Replicate", "Shard", "_StridedShard"}, ("SGD", "heavy ball", "Adam")),
    Way("both", 4, 8, {"Replicate", "Shard", "_StridedShard"}, FOUR),
]


def train_ways(ways: list[Way]) -> list[dict[Case, Trained]]:
    return [train(way.kind, way.cases, STEPS, way.width) for way in ways]


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_many_processes_tune_as_one_does(processes: int) -> None:
    """The processes are started once for all ways to train."""
    ways = [way for way in WAYS if way.processes == processes]
    ranks: list[Any] = run(train_ways, processes, ways)
    for rank in ranks:
        assert not isinstance(rank, Exception), rank
    for place, way in enumerate(ways):
        lrs = [{case: trained.lrs for case, trained in rank[place].items()} for rank in ranks]
        assert all(own == lrs[0] for own in lrs), f"{way}: bit for bit"
        for case, trained in ranks[0][place].items():
            assert trained.placements == way.placements, way
            expected = alone(way.width)[case]
            np.testing.assert_allclose(trained.lrs, expected.lrs, rtol=1e-12, err_msg=f"{way}: {case}")
            for p, q in zip(trained.parameters, expected.parameters, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


PROBED: list[Case] = [("SGD", "auto", "group"), ("Adam", "auto", "global"), ("Adam", "multiplicative", "global")]


def train_with_a_probe() -> dict[str, list[list[float]]]:
    """Rates with a probe of 30 of the coordinates, which each process has a part of."""
    kinds: list[Kind] = ["ddp", "sharded", "parallel"] if dist.is_initialized() else ["alone"]
    return {
        f"{kind} {case}": trained.lrs
        for kind in kinds
        for case, trained in train(kind, PROBED, STEPS, 8, probe=30).items()
    }


def test_many_processes_look_at_the_same_coordinates() -> None:
    first, second = outcomes(train_with_a_probe)
    assert first == second, "bit for bit"
    alone = train_with_a_probe()
    assert len(first) == 3 * len(alone)
    for name, lrs in first.items():
        _, _, case = name.partition(" ")
        np.testing.assert_allclose(lrs, alone[f"alone {case}"], rtol=1e-12, err_msg=name)


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
    first, second = outcomes(train_variants)
    assert first == second, "bit for bit"
    for variant, lrs in first.items():
        # half precision is what the hook asks for
        tolerance = 0.2 if variant == "fp16 hook" else 1e-12
        np.testing.assert_allclose(lrs, train_ddp(variant), rtol=tolerance, err_msg=variant)


def count_collectives() -> list[int]:
    counts = []
    for kind, name, rule in covering(("ddp", "sharded"), OPTIMIZERS, ("auto", "additive")):
        model = network(kind, 8)
        optimizer = OPTIMIZERS[name](model.parameters())
        HypergradientLR(optimizer, rule=rule)
        for step in range(4):
            optimizer.zero_grad()
            model(torch.ones(4, 5, dtype=torch.float64)).square().mean().backward()
            with CommDebugMode() if step >= 2 else contextlib.nullcontext() as mode:
                optimizer.step()
            if mode is not None:
                counts.append(mode.get_total_counts())
    return counts


def count_collectives_of_groups_without_gradients() -> list[int]:
    p = [nn.Parameter(torch.ones(2)) for _ in range(4)]
    optimizer = SGD([{"params": [q]} for q in p], lr=0.1)
    HypergradientLR(optimizer, scope="group")
    counts = []
    for _ in range(4):
        p[1].grad = p[1].detach().clone()
        with CommDebugMode() as mode:
            optimizer.step()
        counts.append(mode.get_total_counts())
    return counts[1:]


def test_there_is_one_collective_a_step() -> None:
    for counts in outcomes(count_collectives):
        assert not isinstance(counts, Exception), counts
        assert len(counts) == 24
        assert set(counts) == {1}
    assert outcomes(count_collectives_of_groups_without_gradients) == [[1, 1, 1]] * 2


def inverse(step: int) -> float:
    return 1 / step


def disagree(what: str) -> None:
    rank = dist.get_rank()
    p = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = SGD(p[: 1 + (what == "shapes" and rank == 1)], lr=0.1)
    if rank == 1 and what in ("lrs", "lrs, one of them 0"):
        optimizer.param_groups[0]["lr"] = 0.2 if what == "lrs" else 0.0
    beta = 0.1 * (1 + (what == "rule" and rank == 1))
    scope: Any = "group" if what == "scope" and rank == 1 else "global"
    low = 0.01 if what == "min_lr" and rank == 1 else 0.0
    rule = Additive(beta, weight=inverse if what == "function" and rank == 1 else inverse_square)
    others = {key: value for key, value in OTHERS.items() if key == what and rank == 1}
    HypergradientLR(optimizer, rule, **{"scope": scope, "min_lr": low, "total_steps": 100, **others})
    if rank == 1 and what == "error":
        optimizer.param_groups[0]["lr"] = math.nan
    p[0].grad = None if what == "lrs" and rank == 0 else torch.ones(3)
    optimizer.step()


OTHERS: dict[str, Any] = {"total_steps": 101, "cooldown": 0.5, "stop_after": 10, "probe": 2, "scheduled": True}
DISAGREEMENTS = ("error", "rule", "function", "scope", "min_lr", "lrs", "lrs, one of them 0", "shapes", *OTHERS)


def disagree_in_turn() -> list[str]:
    """What is told of each disagreement."""
    told = []
    for what in DISAGREEMENTS:
        with pytest.raises((RuntimeError, ValueError)) as error:
            disagree(what)
        told.append(str(error.value))
    return told


def test_processes_that_disagree_are_told_on_every_rank() -> None:
    for told in outcomes(disagree_in_turn):
        assert not isinstance(told, Exception), told
        for what, words in zip(DISAGREEMENTS, told, strict=True):
            key = "rule" if what == "function" else what.partition(",")[0]
            assert f"HypergradientLR(SGD): the settings of the processes differ: {key}" in words
            assert what != "error" or "lr of SGD param_groups[0] must be a finite number" in words


def drift() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.1)
    hd = TrainerEngine(optimizer, rule="additive")
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
    hd.check_agreement()
    optimizer.param_groups[0]["lr"] = 0.1 + 1e-9 * dist.get_rank()
    p.grad = torch.ones(3)
    optimizer.step()
    hd.check_agreement()


def test_rates_that_differ_are_found() -> None:
    for error in outcomes(drift):
        assert isinstance(error, RuntimeError)
        assert "rank 0: step 4, [0.1" in str(error)
        assert "rank 1: step 4, [0.1" in str(error)
        assert "a rate that was written there, a scheduler that is stepped by a metric of its own" in str(error)


def join(early_end: bool = False) -> tuple[int, str, bool]:
    """Uneven numbers of batches: how many steps were taken, what was raised, and whether a parameter has moved."""
    model = DistributedDataParallel(nn.Linear(2, 1))
    before = copy.deepcopy(model.module)
    optimizer = SGD(model.parameters(), lr=0.1)
    hd = HypergradientLR(optimizer)
    try:
        with model.join(throw_on_early_termination=early_end):
            for _ in range(3 + dist.get_rank()):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
    except RuntimeError as error:
        return hd.step_count, str(error), not same(before, model.module)
    return hd.step_count, "", True


def join_that_ends_all() -> tuple[int, str, bool]:
    return join(early_end=True)


def test_uneven_inputs_are_refused_before_the_first_step() -> None:
    for steps, error, moved in outcomes(join):
        assert (steps, moved) == (0, False)
        assert "DistributedDataParallel.join() is not supported" in error
    for steps, error, _ in outcomes(join_that_ends_all):
        assert steps == 3
        assert "exhausted" in error


def apart() -> tuple[list[float], list[str]]:
    own = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SGD([p], lr=0.1 * (1 + dist.get_rank()))
    assert isinstance(own, dist.ProcessGroup)
    hd = HypergradientLR(optimizer, rule="additive", hypergrad_lr=0.01, process_group=own)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for factor in (1.0, 1.0, math.nan):
            p.grad = torch.full_like(p, factor * (1.0 + dist.get_rank()))
            optimizer.step()
    return hd.lrs, [str(warning.message) for warning in caught]


def test_models_that_train_apart_have_a_group_each() -> None:
    (first, told), (second, also_told) = outcomes(apart)
    assert (first, second) == ([pytest.approx(0.1 + 0.01 * 3)], [pytest.approx(0.2 + 0.01 * 12)])
    for (warning,) in (told, also_told):
        assert "not a finite number" in warning


def start_at_zero() -> list[list[float]]:
    """The first rank has all rows of a layer, and the rate is 0 in the first step."""
    lrs = []
    for sharded in (False, True):
        layer = nn.Linear(3, 1, dtype=torch.float64)
        nn.init.constant_(layer.weight, 0.5)
        nn.init.constant_(layer.bias, 0.5)
        if sharded:
            fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = SGD(layer.parameters(), lr=0.01)
        hd = HypergradientLR(
            optimizer,
            process_group=None if sharded else dist.new_group([dist.get_rank()], use_local_synchronization=True),
        )
        optimizer.param_groups[0]["lr"] = 0.0
        for _ in range(5):
            optimizer.zero_grad()
            layer(torch.ones(4, 3, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            lrs.append(hd.lrs)
    return lrs


def test_a_shard_without_elements_takes_part_in_a_first_step_at_a_rate_of_0() -> None:
    first, second = outcomes(start_at_zero)
    assert first == second
    np.testing.assert_allclose(first[5:], first[:5], rtol=1e-12)
    assert first[-1][0] > 0


def without_gradients_by_turns() -> list[list[float]]:
    """Each rank has a gradient in two of three steps, none has one in the last; the gradients are those of the sum."""
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SGD([p], lr=0.1)
    hd = HypergradientLR(optimizer, "multiplicative")
    lrs = []
    for step in range(12):
        p.grad = None if step % 3 == dist.get_rank() or step >= 9 else p.detach().clone()
        optimizer.step()
        lrs.append(hd.lrs)
        dist.broadcast(p.detach(), 0)
    assert hd.step_count == 9
    return lrs


def test_a_rank_without_a_gradient_takes_part() -> None:
    first, second = outcomes(without_gradients_by_turns)
    assert first == second, "bit for bit"
    assert len({lr for (lr,) in first[:9]}) > 5
    assert first[8:] == [first[8]] * 4


class ForMatrices(Optimizer):
    """An optimizer with a state for matrices only."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                if p.ndim == 2:
                    self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.1)
                p.sub_(self.param_groups[0]["lr"] * p.grad)


def start_without_a_gradient() -> list[list[float]]:
    """The first rank has a gradient in the first step, the second has none: at a rate of 0, and with a late state."""
    lrs = []
    for late in (False, True):
        p = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))]
        optimizer = ForMatrices(p) if late else SGD(p, lr=0.0)
        hd = HypergradientLR(optimizer)
        for step in range(4):
            for q in p:
                q.grad = None if step == 0 and dist.get_rank() else q.detach().clone()
            optimizer.step()
            lrs.append(hd.lrs)
    return lrs


def test_a_rank_without_a_gradient_in_the_first_step_takes_part() -> None:
    first, second = outcomes(start_without_a_gradient)
    assert first == second, "bit for bit"
    assert [len({lr for (lr,) in lrs}) for lrs in (first[:4], first[4:])] == [4, 4]


def disagree_with_shards() -> str:
    layer = nn.Linear(3, 2)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    optimizer = SGD(layer.parameters(), lr=0.1 * dist.get_rank())
    HypergradientLR(optimizer)
    layer(torch.ones(4, 3)).square().mean().backward()
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value)


def test_processes_with_shards_that_disagree_are_told_on_every_rank() -> None:
    for words in outcomes(disagree_with_shards):
        assert "the settings of the processes differ: lrs is [0.0] on rank 0 and [0.1] on rank 1" in words


def shard_over_more_than_the_group() -> str:
    layer = nn.Linear(3, 2)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    own = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    with pytest.raises(ValueError, match="process_group lacks the ranks") as error:
        HypergradientLR(SGD(layer.parameters(), lr=0.1), process_group=own)
    return str(error.value)


def test_a_process_group_without_all_that_hold_shards_is_refused() -> None:
    first, second = outcomes(shard_over_more_than_the_group)
    assert "lacks the ranks [1]" in first
    assert "lacks the ranks [0]" in second


def trainers_apart() -> list[float]:
    """A training on a single device each, of another length, while processes are together for something else."""
    hd = HypergradientDescent()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), hd, limit_train_batches=5 * (1 + dist.get_rank()), log_every_n_steps=2)
        trainer.fit(Reference())
    return hd.lrs["lr-SGD"]


def test_trainers_of_one_process_each_tune_apart(tmp_path: Path) -> None:
    first, second = outcomes(trainers_apart)
    hd = HypergradientDescent()
    make_trainer(tmp_path, hd, limit_train_batches=10).fit(Reference())
    assert (first, second) == (hd.lrs["lr-SGD"][:5], hd.lrs["lr-SGD"])


def save_from_one_rank() -> set[str]:
    """DDP's state is the same on all ranks, so that one may ask for it alone, before the first step as well."""
    model = DistributedDataParallel(nn.Linear(3, 2))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    HypergradientLR(optimizer)
    if dist.get_rank() == 0:
        get_optimizer_state_dict(model.module, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
    return {key for state in optimizer.state.values() for key in state}


def test_the_state_may_be_asked_for_on_one_rank_alone() -> None:
    assert outcomes(save_from_one_rank) == [{"momentum_buffer"}] * 2


WORKERS: list[Callable[[], Any]] = [
    train_with_a_probe,
    start_without_a_gradient,
    disagree_with_shards,
    without_gradients_by_turns,
    shard_over_more_than_the_group,
    trainers_apart,
    save_from_one_rank,
    train_variants,
    count_collectives,
    count_collectives_of_groups_without_gradients,
    disagree_in_turn,
    drift,
    join,
    join_that_ends_all,
    apart,
    start_at_zero,
]


def work_all() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for worker in WORKERS:
        try:
            results[worker.__name__] = worker()
        except Exception as error:
            results[worker.__name__] = error
    return results


@functools.cache
def ranks_of_workers() -> list[Any]:
    """What each of two ranks made of all workers, for which they are started once."""
    return run(work_all, 2)


def outcomes(worker: Callable[[], Any]) -> list[Any]:
    return [rank[worker.__name__] for rank in ranks_of_workers()]


def test_a_process_group_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="process_group must be"):
        HypergradientLR(SGD([nn.Parameter(torch.ones(1))], lr=0.1), process_group=3)  # type: ignore[arg-type]
