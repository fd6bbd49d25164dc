"""Learning rates that tune themselves while the model trains, by hypergradient descent."""

from lightning_hd.engine import HypergradientLR, Stats
from lightning_hd.rules import Additive, Auto, Context, Multiplicative, Observation, Rule
from lightning_hd.trainer import HypergradientDescent

__all__ = [
    "Additive",
    "Auto",
    "Context",
    "HypergradientDescent",
    "HypergradientLR",
    "Multiplicative",
    "Observation",
    "Rule",
    "Stats",
]
__version__ = "0.2.0"
