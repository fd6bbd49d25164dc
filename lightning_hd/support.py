"""What the callback takes: strategies, optimizers and modules of a Trainer."""

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

_SUPPORTED = {"SingleDeviceStrategy", "DDPStrategy", "FSDPStrategy", "ModelParallelStrategy"}
_REFUSED = {"DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"}  # though they are subclasses of those
"""By their names, for the package ``pytorch_lightning`` has classes of its own of the same names."""


def strategies(trainer: Trainer) -> set[str]:
    """The names of the strategy's class and of those that it is a subclass of."""
    return {base.__name__ for base in type(trainer.strategy).__mro__}


def with_groups(trainer: Trainer) -> list[Optimizer]:
    """The Trainer's optimizers that have parameters."""
    return [optimizer for optimizer in trainer.optimizers if optimizer.param_groups]


def check_tensors(optimizers: list[Optimizer]) -> None:
    """Raise :class:`ValueError` where two share a rate: each would take what the other learns for a written one."""
    tensors = [
        {id(group["lr"]) for group in optimizer.param_groups if isinstance(group["lr"], Tensor)}
        for optimizer in optimizers
    ]
    for i, own in enumerate(tensors):
        if any(own & others for others in tensors[:i]):
            raise ValueError(
                f"two optimizers share one lr tensor, the second of them {type(optimizers[i]).__name__}: give each its "
                "own, as in lr=torch.tensor(...)"
            )


def check_strategy(trainer: Trainer) -> None:
    """Raise :class:`TypeError` where the Trainer's strategy is not supported."""
    names = strategies(trainer)
    if not names & _SUPPORTED or names & _REFUSED:
        raise TypeError(
            f"HypergradientDescent does not support {type(trainer.strategy).__name__}: its dot products would see a "
            "part of the parameters only. Use strategy='ddp', 'fsdp', ModelParallelStrategy (fully_shard) or a single "
            "device"
        )


def check_modules(pl_module: LightningModule) -> None:
    """Raise :class:`TypeError` where a module has sparse gradients."""
    for name, module in pl_module.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            raise TypeError(
                f"module '{name}' has sparse gradients, which HypergradientDescent does not support: build it with "
                "sparse=False"
            )
