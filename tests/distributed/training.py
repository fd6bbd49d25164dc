"""One training, on one process or on many: the same global batches, and a loss that is their mean."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_hd.trainer.attachment import TrainerEngine
from tests.pairs import covering

BATCH = 16
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": functools.partial(SGD, lr=0.01),
    "heavy ball": functools.partial(SGD, lr=0.01, momentum=0.9),
    "Nesterov": functools.partial(SGD, lr=0.01, momentum=0.9, nesterov=True),
    "Adam": functools.partial(Adam, lr=0.001),
    "AdamW": functools.partial(AdamW, lr=0.001, weight_decay=0.1),
    "RMSprop": functools.partial(RMSprop, lr=0.001),
}
RULES: dict[Any, float | None] = {"auto": None, "additive": 1e-4, "multiplicative": 0.02}
Case = tuple[str, Any, Literal["global", "group"]]
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


class Networks(nn.Module):
    """Many that are alike, side by side in one model: they share the collectives of the strategy."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(made(width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members])


def made(width: int) -> Network:
    torch.manual_seed(0)
    return Network(width).double()


def network(kind: Kind, width: int) -> nn.Module:
    return placed(made(width), kind)


def placed(model: nn.Module, kind: Kind) -> nn.Module:
    """A model for the processes that there are: each with a copy, or with shards."""
    count = dist.get_world_size() if dist.is_initialized() else 1
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "sharded":
        fully_shard(model, mesh=init_device_mesh("cpu", (count,)))
    elif kind == "hybrid":
        fully_shard(model, mesh=init_device_mesh("cpu", (count // 2, 2), mesh_dim_names=("copies", "shards")))
    elif kind in ("parallel", "both"):
        shape = (1, count) if kind == "parallel" else (count // 2, 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        for part in model.modules():
            if isinstance(part, Network):
                parallelize_module(part, mesh["tensor"], {"inner": ColwiseParallel(), "outer": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
    return model


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


def tuner(parameters: list[nn.Parameter], case: Case, probe: Any = "default") -> TrainerEngine:
    name, rule, scope = case
    optimizer = OPTIMIZERS[name]([{"params": parameters[:2]}, {"params": parameters[2:]}])
    optimizer.param_groups[1]["lr"] /= 2
    return TrainerEngine(optimizer, rule=rule, hypergrad_lr=RULES[rule], scope=scope, probe=probe)


def train(kind: Kind, cases: list[Case], steps: int, width: int, probe: Any = "default") -> dict[Case, Trained]:
    """All cases side by side, a network for each."""
    networks = Networks(len(cases), width)
    model = placed(networks, kind)
    parameters = [list(member.parameters()) for member in networks.members]
    hds = [tuner(own, case, probe) for own, case in zip(parameters, cases, strict=True)]
    lrs: list[list[list[float]]] = [[] for _ in cases]
    generator = torch.Generator().manual_seed(1)
    part = share(kind)
    for _ in range(steps):
        x = torch.randn(BATCH, 5, generator=generator, dtype=torch.float64)
        y = torch.sin(x @ torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3))
        model.zero_grad()
        (model(x[part]) - y[part]).square().mean(dim=(1, 2)).sum().backward()
        for hd, own in zip(hds, lrs, strict=True):
            hd._optimizer.step()
            own.append(hd.lrs)
            assert all(map(math.isfinite, hd.lrs))
    for hd in hds:
        hd.check_agreement()
    return {
        case: Trained(own, [whole(p) for p in ps], {type(q).__name__ for p in ps for q in getattr(p, "placements", ())})
        for case, own, ps in zip(cases, lrs, parameters, strict=True)
    }


CASES: list[Case] = covering(OPTIMIZERS, RULES, ("global", "group"))  # type: ignore[assignment]
