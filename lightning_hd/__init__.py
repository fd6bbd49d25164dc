"""Learning rates that tune themselves while the model trains, by hypergradient descent."""

from lightning_hd.engine import HypergradientLR
from lightning_hd.rules import Additive, Auto, Context, Multiplicative, Observation, Rule
from lightning_hd.trainer.callback import HypergradientDescent

__all__ = [
    "Additive",
    "Auto",
    "Context",
    "HypergradientDescent",
    "HypergradientLR",
    "Multiplicative",
    "Observation",
    "Rule",
]
__version__ = "0.1.0"
