"""Learning rates that tune themselves while the model trains, by hypergradient descent."""

from lightning_hd.engine.stats import Stats
from lightning_hd.engine.tuner import HypergradientLR
from lightning_hd.rules import Additive, Auto, Multiplicative, Observation, Rule
from lightning_hd.trainer import HypergradientDescent

__all__ = [
    "Additive",
    "Auto",
    "HypergradientDescent",
    "HypergradientLR",
    "Multiplicative",
    "Observation",
    "Rule",
    "Stats",
]
__version__ = "0.1.0"
