"""Processes that hold nothing of the tuned parameters, zeros only, or shards that look like wholes."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import SGD, Optimizer, RMSprop

from lightning_hd import HypergradientLR
from tests.distributed.processes import run

JOIN = 15


def network(out: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, out)).double()


def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
    x = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    if dist.is_initialized():
        x = x.chunk(dist.get_world_size())[dist.get_rank()]
    optimizer.zero_grad()
    y = model(x)
    (y - x[:, : y.shape[1]].sin()).square().mean().backward()
    optimizer.step()


def join(cls: Any, out: int) -> tuple[list[float], list[int]]:
    """The rates where the first layer joins the last one, of whose rows there may be fewer than processes."""
    model = network(out)
    model[0].requires_grad_(False)
    if dist.is_initialized():
        fully_shard(model)
    optimizer = cls(model[2].parameters(), lr=1e-3)
    hd, rates, shape = HypergradientLR(optimizer), [], [0]
    for number in range(JOIN + 10):
        if number == JOIN:
            shape = list(hd.state_dict()["view"]["memory"].shape)  # every process takes part in it
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[0].parameters())})
        step(model, optimizer, number)
        rates.append(hd.lrs[0])
    return rates, shape


def join_in_turn() -> list[tuple[list[float], list[int]]]:
    return [join(cls, out) for cls in (SGD, RMSprop) for out in (1, 2)]


def test_a_process_without_elements_saves_and_votes_as_the_others_do() -> None:
    expected = join_in_turn()
    for found in run(join_in_turn, 2):
        assert not isinstance(found, Exception), found
        for (rates, shape), (alone, whole) in zip(found, expected, strict=True):
            assert rates == pytest.approx(alone, rel=1e-9)
            assert shape == whole
            assert rates[JOIN] < 0.5 * max(rates[:JOIN]), "the rate starts anew"


def train_zeros() -> list[float]:
    model: nn.Module = nn.Linear(5, 2, bias=False).double()
    nn.init.zeros_(model.weight)  # type: ignore[arg-type]
    if dist.is_initialized():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch advises fully_shard
            model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = SGD(model.parameters(), lr=0.1)
    hd, rates = HypergradientLR(optimizer), []
    for number in range(20):
        step(model, optimizer, number)
        rates += hd.lrs
    return rates


def test_flat_shards_of_zeros_are_not_taken_for_copies() -> None:
    for rates in run(train_zeros, 2):
        assert not isinstance(rates, Exception), rates
        assert rates == pytest.approx(train_zeros(), rel=1e-9)


def refuse() -> str:
    from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform  # what DistributedDataParallel calls

    model = network(2)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    _pre_dp_module_transform(model)
    with pytest.raises(TypeError) as error:
        HypergradientLR(SGD(model.parameters(), lr=0.1))
    return str(error.value)


def test_data_parallelism_over_tensor_parallelism_is_refused() -> None:
    for told in run(refuse, 2):
        assert not isinstance(told, Exception), told
        assert "over tensor parallelism is not supported: use torch.distributed.fsdp.fully_shard" in told
