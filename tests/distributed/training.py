"""One training, on one process or on many: the same global batches, and a loss that is their mean."""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_hd import HypergradientLR

BATCH = 16
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": functools.partial(SGD, lr=0.01),
    "heavy ball": functools.partial(SGD, lr=0.01, momentum=0.9),
    "Nesterov": functools.partial(SGD, lr=0.01, momentum=0.9, nesterov=True),
    "Adam": functools.partial(Adam, lr=0.001),
    "AdamW": functools.partial(AdamW, lr=0.001, weight_decay=0.1),
    "RMSprop": functools.partial(RMSprop, lr=0.001),
}
RULES = {"auto": None, "additive": 1e-4, "multiplicative": 0.02}
Case = tuple[str, str, Literal["global", "group"]]
Kind = Literal["alone", "ddp", "sharded", "hybrid", "parallel", "both"]


class Network(nn.Module):
    """Layers of sizes that do not divide by two or four, and one row that most ranks have nothing of."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(5, width)
        self.outer = nn.Linear(width, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.scale * self.outer(self.inner(x).tanh())
        return y


class Trained(NamedTuple):
    """Effective rates of all groups, step by step, the parameters after the last, and how they were placed."""

    lrs: list[list[float]]
    parameters: list[Tensor]
    placements: set[str]


def network(kind: Kind, width: int) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = Network(width).double()
    count = dist.get_world_size() if dist.is_initialized() else 1
    if kind == "ddp":
        return DistributedDataParallel(made)
    if kind == "sharded":
        mesh = init_device_mesh("cpu", (count,))
        fully_shard(made, mesh=mesh)
    elif kind == "hybrid":
        fully_shard(made, mesh=init_device_mesh("cpu", (count // 2, 2), mesh_dim_names=("copies", "shards")))
    elif kind in ("parallel", "both"):
        shape = (1, count) if kind == "parallel" else (count // 2, 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        parallelize_module(made, mesh["tensor"], {"inner": ColwiseParallel(), "outer": RowwiseParallel()})
        fully_shard(made, mesh=mesh["data"])
    return made


def share(kind: Kind) -> slice:
    """Which part of each global batch this process sees."""
    if kind in ("alone", "parallel"):
        return slice(None)
    parts, rank = dist.get_world_size(), dist.get_rank()
    if kind == "both":
        parts, rank = parts // 2, rank // 2
    size = BATCH // parts
    return slice(rank * size, (rank + 1) * size)


def whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach().clone()


def train(kind: Kind, case: Case, steps: int, width: int = 7) -> Trained:
    name, rule, scope = case
    model = network(kind, width)
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS[name]([{"params": parameters[:2]}, {"params": parameters[2:]}])
    optimizer.param_groups[1]["lr"] /= 2
    hd = HypergradientLR(optimizer, rule=rule, hypergrad_lr=RULES[rule], scope=scope)
    generator = torch.Generator().manual_seed(1)
    part = share(kind)
    lrs = []
    for _ in range(steps):
        x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
        y = torch.sin(x @ torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3))
        optimizer.zero_grad()
        (model(x[part]) - y[part]).square().mean().backward()
        optimizer.step()
        lrs.append(hd.lrs)
        assert all(map(math.isfinite, hd.lrs))
    hd.check_agreement()
    placements = {type(placement).__name__ for p in parameters for placement in getattr(p, "placements", ())}
    return Trained(lrs, [whole(p) for p in parameters], placements)


def train_all(kind: Kind, cases: list[Case], steps: int, width: int = 7) -> dict[Case, Trained]:
    return {case: train(kind, case, steps, width) for case in cases}


CASES: list[Case] = [
    (name, rule, scope)
    for name in ("SGD", "Nesterov", "Adam", "RMSprop")
    for rule in RULES
    for scope in ("global", "group")
]
FEW_CASES: list[Case] = [
    ("SGD", "auto", "global"),
    ("SGD", "additive", "group"),
    ("heavy ball", "multiplicative", "global"),
    ("Nesterov", "auto", "group"),
    ("Adam", "additive", "global"),
    ("AdamW", "auto", "global"),
    ("RMSprop", "multiplicative", "group"),
    ("RMSprop", "auto", "global"),
]
"""Every optimizer, rule and scope once at least."""
