"""What is seen of the model: gradients, and how the parameters moved."""

from lightning_hd.hypergradient.buckets import squared_norm
from lightning_hd.hypergradient.copies import copies_of, following, leave_copies, load_copies
from lightning_hd.hypergradient.directions import Measured, direction_of
from lightning_hd.hypergradient.displacement import Displacement
from lightning_hd.hypergradient.last_step import LastStep
from lightning_hd.hypergradient.probe import PROBE
from lightning_hd.hypergradient.view import UNSEEN, Retained, Sight, View

__all__ = [
    "PROBE",
    "UNSEEN",
    "Displacement",
    "LastStep",
    "Measured",
    "Retained",
    "Sight",
    "View",
    "copies_of",
    "direction_of",
    "following",
    "leave_copies",
    "load_copies",
    "squared_norm",
]
