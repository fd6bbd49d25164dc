"""The callback, and what it needs of a Trainer. Only this folder and ``reporting`` import Lightning."""

from lightning_hd.trainer.callback import HypergradientDescent

__all__ = ["HypergradientDescent"]
