"""FullyShardedDataParallel with ``use_orig_params=True``: shards that are slices of flat parameters."""

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.optim import SGD

from lightning_hd import HypergradientLR
from lightning_hd.trainer.attachment import TrainerEngine
from tests.distributed.processes import run
from tests.distributed.training import BATCH, OPTIMIZERS, made, share

STEPS, SAVED = 20, 10


def flat(
    model: nn.Module, strategy: ShardingStrategy = ShardingStrategy.FULL_SHARD, original: bool = True
) -> nn.Module:
    """The model, each of its layers of its own and the rest together; of some, a process has nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises fully_shard
        wrap = functools.partial(
            FullyShardedDataParallel,
            device_id=torch.device("cpu"),
            use_orig_params=original,
            sharding_strategy=strategy,
        )
        for name, child in list(model.named_children()):
            setattr(model, name, wrap(child))
        return wrap(model)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [{"params": parameters[:2]}, {"params": parameters[2:]}]


def train(name: str, scope: Any, probe: int | None, sharded: bool, state: Any = None) -> tuple[list[Any], Any]:
    """The rates of all steps, and the state of the engine before one of them."""
    model: nn.Module = made(9)
    model = flat(model) if sharded else model
    optimizer = OPTIMIZERS[name](groups(model))
    hd = TrainerEngine(optimizer, scope=scope, probe=probe)
    lrs, saved = [], None
    part = share("ddp" if sharded else "alone")
    for step in range(STEPS):
        x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        if step == SAVED:
            saved = hd.state_dict()
            if state is not None:  # that of another number of processes goes on as its own
                hd.load_state_dict(state)
        model.zero_grad()
        (model(x[part]) - torch.sin(x[part, :3])).square().mean().backward()
        optimizer.step()
        lrs.append(hd.lrs)
    hd.check_agreement()
    return lrs, saved


Case = tuple[str, str, int | None]
CASES: list[Case] = [(name, ("global", "group")[i % 2], None) for i, name in enumerate(OPTIMIZERS)]
CASES += [("Adam", "global", 40), ("SGD", "group", 23)]


def train_all(cases: list[Case], states: list[Any]) -> list[Any]:
    return [train(*case, sharded=dist.is_initialized(), state=state) for case, state in zip(cases, states, strict=True)]


@pytest.mark.parametrize(("processes", "cases"), [(2, CASES), pytest.param(4, CASES[-2:], marks=pytest.mark.slow)])
def test_flat_shards_tune_as_one_process_does(processes: int, cases: list[Case]) -> None:
    alone = train_all(cases, [None] * len(cases))
    ranks = run(train_all, processes, cases, [state for _, state in alone])
    for rank in ranks:
        assert not isinstance(rank, Exception), rank
        for case, (lrs, state), (expected, own) in zip(cases, rank, alone, strict=True):
            np.testing.assert_allclose(lrs, expected, rtol=1e-12, err_msg=str(case))
            assert state["view"]["parameters"] == own["view"]["parameters"]
            torch.testing.assert_close(state["view"]["memory"], own["view"]["memory"], rtol=1e-9, atol=1e-12)
    assert all([lrs for lrs, _ in rank] == [lrs for lrs, _ in ranks[0]] for rank in ranks), "bit for bit"


def refuse() -> list[str]:
    """What is said of rules and ways to shard that are not supported."""
    told = []
    with pytest.raises(TypeError) as error:
        HypergradientLR(SGD(flat(made(4)).parameters(), lr=0.1), "additive")
    told.append(str(error.value))
    with pytest.raises(TypeError) as error:
        HypergradientLR(SGD(flat(made(4), original=False).parameters(), lr=0.1))
    told.append(str(error.value))
    model = flat(made(4), ShardingStrategy.NO_SHARD)
    optimizer = SGD(model.parameters(), lr=0.1)
    HypergradientLR(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(2, 5, dtype=torch.float64)).square().mean().backward()
    with pytest.raises(TypeError) as error:
        optimizer.step()
    told.append(str(error.value))
    assert all(map(torch.equal, model.parameters(), before))
    return told


def test_what_cannot_be_had_is_refused_on_every_rank() -> None:
    for told in run(refuse, 2):
        assert not isinstance(told, Exception), told
        rule, groups, copies = told
        assert "rule Additive does not support FullyShardedDataParallel: use rule='auto'" in rule
        assert "pass use_orig_params=True" in groups
        assert "several processes hold the same part of the flat parameters" in copies


def save(folder: Path) -> Tensor:
    """The state is a vector that any process may write down."""
    model = flat(made(9))
    optimizer = SGD(model.parameters(), lr=0.1)
    hd = HypergradientLR(optimizer)
    for _ in range(3):
        model.zero_grad()
        model(torch.ones(4, 5, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    state = hd.state_dict()
    if dist.get_rank() == 1:
        torch.save(state, folder / "state")
    dist.barrier()
    hd.load_state_dict(torch.load(folder / "state", weights_only=True))
    memory: Tensor = hd.state_dict()["view"]["memory"]
    assert torch.equal(memory, state["view"]["memory"])
    return memory


def test_any_process_may_write_the_state_down(tmp_path: Path) -> None:
    first, second = run(save, 2, tmp_path)
    assert torch.equal(first, second)
    assert first.shape == (4, sum(p.numel() for p in made(9).parameters()))
