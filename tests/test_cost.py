"""What a step costs, counted: operations, host reads and bytes, whatever the number of tensors. Nothing is timed."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop, lr_scheduler

from lightning_hd import HypergradientLR
from tests.benchmarks.cost import counted, kept

FAMILIES: list[Any] = [
    pytest.param(SGD, {}, 1, id="SGD"),
    pytest.param(SGD, {"momentum": 0.9}, 0, id="heavy ball"),
    pytest.param(SGD, {"momentum": 0.9, "nesterov": True}, 1, id="Nesterov"),
    pytest.param(Adam, {}, 0, id="Adam"),
    pytest.param(Adam, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}, 0, id="amsgrad"),
    pytest.param(AdamW, {"weight_decay": 0.1, "fused": True}, 0, id="AdamW"),
    pytest.param(RMSprop, {}, 1, id="RMSprop"),
]
RULES = ("additive", "multiplicative", "auto")


def build(cls: Any, settings: dict[str, Any], tensors: int, size: int = 64, groups: int = 1) -> Optimizer:
    parameters = [nn.Parameter(torch.randn(size)) for _ in range(tensors)]
    for p in parameters:
        p.grad = torch.randn(size)
    parts = [{"params": parameters[i::groups]} for i in range(groups)]
    optimizer: Optimizer = cls(parts, lr=1e-3, **settings)
    return optimizer


def added(optimizer: Optimizer, plain: Optimizer, steps: int = 4) -> tuple[int, int]:
    """Operations and host reads of a late step, beyond those of the optimizer alone."""
    for _ in range(steps):
        optimizer.step()
        plain.step()
    tuned, alone = counted(optimizer.step), counted(plain.step)
    return tuned[0] - alone[0], tuned[1] - alone[1]


@pytest.mark.parametrize(("cls", "settings", "copies"), FAMILIES)
@pytest.mark.parametrize("rule", RULES)
def test_a_step_costs_the_same_whatever_the_number_of_tensors(
    cls: Any, settings: dict[str, Any], copies: int, rule: Any
) -> None:
    counts = []
    for tensors in (10, 1000 if cls is SGD and not settings else 100):
        optimizer = build(cls, settings, tensors)
        engine = HypergradientLR(optimizer, rule)
        counts.append(added(optimizer, build(cls, settings, tensors)))
        bytes_kept = kept(engine, optimizer)
        if rule == "auto":
            assert bytes_kept <= 4 * 8 * 64 * tensors + 1000  # four vectors in float64
        else:
            assert bytes_kept == pytest.approx(copies * 4 * 64 * tensors, abs=1000)
    assert len(set(counts)) == 1, "as many for 10 tensors as for more"
    operations, reads = counts[0]
    assert 5 < operations <= (30 if rule == "auto" else 100)
    assert reads == 1


@pytest.mark.parametrize("probe", [None, 2**12])
def test_a_large_model_costs_what_the_probe_does(probe: int | None) -> None:
    optimizer = build(Adam, {}, 40, size=2**14)
    engine = HypergradientLR(optimizer, probe=probe)
    operations, reads = added(optimizer, build(Adam, {}, 40, size=2**14))
    assert operations <= 100
    assert reads == 1
    numbers = probe or 40 * 2**14
    # Four vectors, and for how many coordinates each one stands.
    assert kept(engine, optimizer) <= 8 * numbers * (4 if probe is None else 5) + 1000


def test_the_default_probe_is_bounded() -> None:
    optimizer = build(SGD, {}, 4, size=2**20)
    engine = HypergradientLR(optimizer)
    for _ in range(2):
        optimizer.step()
    assert kept(engine, optimizer) <= 3 * 2**20
    looked_at, numbers = engine.stats.coordinates
    assert looked_at == pytest.approx(2**16, rel=1e-3)
    assert numbers == 2**22


@pytest.mark.parametrize("rule", RULES)
def test_groups_with_the_same_settings_cost_no_more(rule: Any) -> None:
    counts = []
    for groups in (1, 10):
        optimizer = build(Adam, {}, 20, groups=groups)
        HypergradientLR(optimizer, rule)
        counts.append(added(optimizer, build(Adam, {}, 20, groups=groups)))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("rule", RULES)
def test_a_schedule_and_clamps_need_no_further_reads(rule: Any) -> None:
    reads = []
    for tuned in (False, True):
        optimizer = build(AdamW, {}, 5, groups=2)
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
        if tuned:
            HypergradientLR(optimizer, rule, max_lr=0.01)

        def step(optimizer: Optimizer = optimizer, scheduler: Any = scheduler) -> None:
            optimizer.step()
            scheduler.step()

        for _ in range(3):
            step()
        reads.append(counted(step)[1])
    assert reads[1] == reads[0] + 1
