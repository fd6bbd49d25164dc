"""Tags are spelled as LearningRateMonitor spells its own."""

from torch import nn
from torch.optim import SGD, Adam, Optimizer

from lightning_hd.optimizers import group_names
from lightning_hd.reporting.names import optimizer_names, tag


def make(cls: type[Optimizer], *groups: dict[str, str]) -> Optimizer:
    return cls([{"params": [nn.Parameter(nn.Linear(1, 1).weight.detach())], **group} for group in groups])  # type: ignore[call-arg]


def test_optimizers_of_one_class_are_numbered() -> None:
    assert optimizer_names([make(Adam, {}), make(SGD, {}), make(Adam, {}), make(Adam, {})]) == [
        "Adam",
        "SGD",
        "Adam-1",
        "Adam-2",
    ]


def test_groups() -> None:
    assert group_names("Adam", make(Adam, {})) == ["Adam"]
    assert group_names("Adam", make(Adam, {"name": "all"})) == ["Adam/all"]
    assert group_names("Adam-1", make(Adam, {}, {"name": "head"})) == ["Adam-1/pg1", "Adam-1/head"]
    assert group_names("Adam", make(Adam, {"name": "x"}, {"name": "x"})) == ["Adam/pg1", "Adam/pg2"]


def test_tag() -> None:
    assert tag("lr", "Adam/pg1") == "hd/lr-Adam/pg1"
