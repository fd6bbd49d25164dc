"""The engine: it tunes the learning rate of one torch optimizer, in any training loop."""

from lightning_hd.engine.arguments import check_arguments, check_callback_arguments, make_decline
from lightning_hd.engine.tuner import HypergradientLR

__all__ = ["HypergradientLR", "check_arguments", "check_callback_arguments", "make_decline"]
