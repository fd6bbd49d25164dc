"""Tags of the logged numbers. They are spelled as those of ``LearningRateMonitor``."""

from collections.abc import Sequence

from torch.optim import Optimizer

PREFIX = "hd/"
"""It is short, because TensorBoard cuts off the titles of its cards."""

_ANY = "(.*-)?"  # a logger's prefix, which Lightning puts before all tags, with a dash

LAYOUT = {
    "learning rate": {
        "learning rate, log10": ["Multiline", [f"{_ANY}hd/log10_lr"]],
        "learning rate": ["Multiline", [f"{_ANY}hd/lr-", f"{_ANY}lr-"]],
        "loss": ["Multiline", [".*loss"]],
        "effective rate, schedule, scale, log10": ["Multiline", [f"{_ANY}hd/log10_(lr|schedule|scale)"]],
        "cosine and its running mean": ["Multiline", [f"{_ANY}hd/(mean_)?cosine"]],
        "backoffs": ["Multiline", [f"{_ANY}hd/backoffs"]],
    }
}
"""The charts in the tab "Custom scalars". Each shows the tags whose beginning matches one of its expressions."""


def tag(quantity: str, name: str = "") -> str:
    """The tag of a quantity (``lr``, ``scale``, ``hypergradient``, ``cosine``, ``backoffs``): ``hd/lr-Adam``."""
    return f"{PREFIX}{quantity}-{name}" if name else f"{PREFIX}{quantity}"


def optimizer_names(optimizers: Sequence[Optimizer]) -> list[str]:
    """The class name of each optimizer, with ``-1``, ``-2`` for further ones of the same class."""
    names = [type(optimizer).__name__ for optimizer in optimizers]
    return [f"{name}-{before}" if (before := names[:i].count(name)) else name for i, name in enumerate(names)]
