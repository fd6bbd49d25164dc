"""The engine: it tunes the learning rate of one torch optimizer, in any training loop."""

from lightning_hd.engine.arguments import check_arguments, make_cooldown
from lightning_hd.engine.stats import Stats
from lightning_hd.engine.suggestion import suggestions
from lightning_hd.engine.tuner import HypergradientLR, common_rate

__all__ = ["HypergradientLR", "Stats", "check_arguments", "common_rate", "make_cooldown", "suggestions"]
