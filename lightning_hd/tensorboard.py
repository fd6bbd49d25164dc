"""Tags of the logged numbers, spelled as ``LearningRateMonitor`` spells its own."""

from collections import Counter
from collections.abc import Sequence

from torch.optim import Optimizer


def tag(quantity: str, name: str) -> str:
    """The tag of a quantity (``lr``, ``scale``, ``value``, ``cosine``, ``brakes``): ``hypergradient/lr-Adam``."""
    return f"hypergradient/{quantity}-{name}"


def optimizer_names(optimizers: Sequence[Optimizer]) -> list[str]:
    """The class name of each optimizer, with ``-1``, ``-2`` for further ones of the same class."""
    seen: Counter[str] = Counter()
    names = []
    for optimizer in optimizers:
        name = type(optimizer).__name__
        names.append(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def group_names(optimizer_name: str, optimizer: Optimizer) -> list[str]:
    """A name for each parameter group: the optimizer's, then ``/`` and the group's ``name``, or ``pg1``, ``pg2``, ….

    A single group without a name is called as its optimizer. Names that are not unique are passed over.
    """
    groups = optimizer.param_groups
    if len(groups) == 1 and "name" not in groups[0]:
        return [optimizer_name]
    names = [str(group.get("name", f"pg{i}")) for i, group in enumerate(groups, start=1)]
    if len(set(names)) < len(names):
        names = [f"pg{i}" for i in range(1, len(groups) + 1)]
    return [f"{optimizer_name}/{name}" for name in names]
