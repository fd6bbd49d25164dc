"""The probe: which coordinates are looked at, and what is gathered of them."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from lightning_hd import HypergradientLR
from lightning_hd.hypergradient.buckets import flatten, gather, pack
from lightning_hd.hypergradient.probe import Slot, allot, choose, look
from lightning_hd.processes import Ranks


def slots_of(parameters: Sequence[Tensor], budget: int | None) -> list[Slot]:
    return look([(0, j, p) for j, p in enumerate(parameters)], budget, Ranks(None), {})


@hypothesis.settings(deadline=None, max_examples=200, derandomize=True, database=None)
@hypothesis.given(st.lists(st.integers(0, 20_000), min_size=1, max_size=30), st.integers(1, 50_000))
def test_the_budget_is_kept_and_small_parameters_are_looked_at_as_a_whole(sizes: list[int], budget: int) -> None:
    counts = allot(sizes, budget)
    assert all(min(size, 1) <= count <= size for size, count in zip(sizes, counts, strict=True))
    if sum(sizes) <= budget:
        assert counts == sizes
    else:
        assert budget - len(sizes) <= sum(counts) <= max(budget, len(sizes))
        assert sorted(counts) == [count for _, count in sorted(zip(sizes, counts, strict=True))], (
            "none has less than a smaller one"
        )


@hypothesis.settings(deadline=None, max_examples=200, derandomize=True, database=None)
@hypothesis.given(st.integers(1, 100_000), st.integers(1, 100_000), st.text(max_size=5))
def test_blocks_are_apart_in_order_and_as_many_as_asked(size: int, count: int, seed: str) -> None:
    blocks = choose(size, count, seed)
    assert blocks == choose(size, count, seed), "the same in every process"
    ends = [0, *(end for block in blocks for end in block), size]
    assert ends == sorted(ends)
    taken = sum(stop - start for start, stop in blocks)
    assert taken == min(size, count) or (count < size and count - len(blocks) <= taken <= count)
    if len(blocks) > 1:
        longest = max(b - a for a, b in zip(ends[::2], ends[1::2], strict=True))
        assert longest <= 2 * math.ceil(size / len(blocks)), "spread over the whole parameter"


def test_sums_over_a_probe_are_unbiased_estimates_of_those_over_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 200), (10,), (77, 5, 3), (50_000,)]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator) * 10**-i) for i, shape in enumerate(shapes)]
    exact = sum(float(p.detach().double().square().sum()) for p in parameters)
    found = []
    for i in range(200):  # in other places of the groups, other coordinates are chosen
        slots = look([(i, j, p) for j, p in enumerate(parameters)], 4_000, Ranks(None), {})
        total = 0.0
        for bucket in pack(slots, lambda _: 0):
            x = gather(bucket.views(flatten(slots, [slot.p.detach() for slot in slots]))).double()
            assert bucket.weights is not None
            total += float((x * x * bucket.weights).sum())
        found.append(total)
    assert np.mean(found) == pytest.approx(exact, rel=3 * np.std(found) / exact / math.sqrt(len(found)))
    assert np.std(found) < 0.1 * exact


@pytest.mark.parametrize("layout", ["rows", "channels last", "transposed"])
def test_positions_and_pieces_agree_in_every_layout(layout: str) -> None:
    values = torch.arange(4 * 6 * 5 * 7.0).view(4, 6, 5, 7)
    if layout == "channels last":
        values = values.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        values = values.transpose(0, 3)
    p = nn.Parameter(values)
    (slot,) = slots_of([p], 100)
    (bucket,) = pack([slot], lambda _: 0)
    found = gather(bucket.views(flatten([slot], [p.detach()])))
    in_memory = p.detach().permute(*sorted(range(4), key=lambda i: -p.stride()[i])).flatten()
    expected = torch.cat([in_memory[start:stop] for start, stop in slot.blocks])
    assert torch.equal(found, expected)
    assert slot.positions().tolist() == list(range(100))
    gradient = p.detach().contiguous()  # rows, whatever the parameter's layout is
    assert torch.equal(*flatten([slot, slot], [gradient, p.detach()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [300, 5_000, 2**18])
def test_small_tensors_are_gathered_as_wholes_and_give_the_same_numbers(dtype: torch.dtype, limit: int) -> None:
    sizes = [*(20 * [1_000]), 40_000, 3, 2_048, 2_049]
    parameters = [nn.Parameter(torch.randn(size).to(dtype)) for size in sizes]
    slots = slots_of(parameters, 20_000)
    flats = flatten(slots, [p.detach() for p in parameters])
    buckets = pack(slots, lambda _: 0, cached=limit)
    for bucket in buckets:
        out = torch.empty(bucket.size)
        bucket.gather(flats, out)
        assert torch.equal(out, gather(bucket.views(flats)).float())
        assert all(stretch.copied < limit + 20_000 for stretch in bucket.stretches)
    copied = sum(stretch.copied for bucket in buckets for stretch in bucket.stretches)
    assert copied > sum(slot.count for slot in slots), "some are wholes of which a part is looked at"


def test_large_tensors_are_looked_at_where_they_are() -> None:
    sizes = [1_000, 40_000, 1_000, 90_000]
    parameters = [nn.Parameter(torch.randn(size)) for size in sizes]
    flats = flatten(slots := slots_of(parameters, None), [p.detach() for p in parameters])
    buckets = pack(slots, lambda _: 0, cached=50_000, alone=2**15)
    assert [bucket.size for bucket in buckets] == [2_000, 40_000, 50_000, 40_000]
    for bucket in buckets[1:]:
        ((place, ((start, _),)),) = bucket.parts.items()
        assert gather(bucket.views(flats)).data_ptr() == parameters[place].data_ptr() + 4 * start


@pytest.mark.parametrize("sizes", [(2**15,), (10, 2**15 - 1, 2**19 + 7), (2**20 + 1, 3, 2**16)])
def test_the_paper_s_numbers_do_not_depend_on_the_sizes_of_tensors(sizes: tuple[int, ...]) -> None:
    parameters = [nn.Parameter(torch.randn(size)) for size in sizes]
    optimizer = SGD(parameters, lr=1e-3)
    hd = HypergradientLR(optimizer, "additive", hypergrad_lr=0.0)
    gradients = []
    for _ in range(3):
        gradients.append([torch.randn(size) for size in sizes])
        for p, g in zip(parameters, gradients[-1], strict=True):
            p.grad = g.clone()
        optimizer.step()
    last, now = ([g.numpy().astype(np.float64) for g in found] for found in gradients[1:])
    (seen,) = hd.last
    assert seen is not None
    assert seen.hypergradient == pytest.approx(-sum(a @ b for a, b in zip(last, now, strict=True)), rel=1e-4, abs=1e-2)
    assert seen.grad_norm == pytest.approx(math.sqrt(sum(g @ g for g in now)), rel=1e-5)
    assert seen.direction_norm == pytest.approx(math.sqrt(sum(g @ g for g in last)), rel=1e-5)


def train(budget: Any, rule: Any, cls: Any, steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 1)).double()
    optimizer = cls(network.parameters(), lr=1e-3)
    hd = HypergradientLR(optimizer, rule, probe=budget)
    lrs = []
    for step in range(steps):
        x = torch.randn(32, 20, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        (network(x) - x.sum(1, keepdim=True).sin()).square().mean().backward()
        optimizer.step()
        lrs += hd.lrs
    return lrs


@pytest.mark.parametrize("rule", ["auto", "multiplicative"])
@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_a_probe_that_holds_everything_is_no_probe_and_a_smaller_one_is_near(rule: Any, cls: Any) -> None:
    every = train(None, rule, cls)
    assert train(44_601, rule, cls) == every
    assert train("default", rule, cls) == every
    part = train(4_000, rule, cls)
    assert part != every
    assert part == train(4_000, rule, cls), "the same coordinates in every run"
    assert np.abs(np.log(np.array(part) / np.array(every))).max() < 1.0


def test_a_parameter_that_moves_to_other_memory_is_followed() -> None:
    runs = []
    for moved in (False, True):
        p = nn.Parameter(torch.linspace(1, 2, 10, dtype=torch.float64))
        optimizer = Adam([p])
        hd = HypergradientLR(optimizer)
        for step in range(6):
            if moved and step == 3:
                p.data = p.data.clone()
            p.grad = p.detach().clone()
            optimizer.step()
        runs.append((hd.lrs, p.tolist()))
    assert runs[0] == runs[1]


def test_parameters_that_are_frozen_are_not_looked_at_until_they_are_not() -> None:
    a, b = nn.Parameter(torch.ones(100)), nn.Parameter(torch.ones(50), requires_grad=False)
    optimizer = SGD([a, b], lr=0.1)
    hd = HypergradientLR(optimizer)
    lrs = []
    for step in range(8):
        b.requires_grad_(step >= 4)
        for p in (a, b):
            p.grad = p.detach().clone() if p.requires_grad else None
        optimizer.step()
        assert hd.stats.coordinates == ((150, 150) if step >= 4 else (100, 100))
        lrs += hd.lrs
    assert all(y > x for x, y in itertools.pairwise(lrs[:4]))
    assert lrs[4] == pytest.approx(lrs[0], rel=0.2), "the rate was found without the second one, so it starts anew"
    assert all(y > x for x, y in itertools.pairwise(lrs[4:]))


@pytest.mark.parametrize(
    ("probe", "error", "words"),
    [
        (0, ValueError, "probe must be at least 1, or None for all coordinates, got 0"),
        (-5, ValueError, "probe must not be negative"),
        (1.5, TypeError, "probe must be a whole number"),
        ("all", ValueError, "probe must be a whole number, None for all coordinates, or 'default', got 'all'"),
        (True, TypeError, "probe must be a whole number"),
    ],
)
def test_a_bad_probe_is_named(probe: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        HypergradientLR(SGD([nn.Parameter(torch.ones(2))], lr=0.1), probe=probe)
