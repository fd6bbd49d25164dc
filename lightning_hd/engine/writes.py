"""Detects learning rates that are written into the parameter groups again and again, as a schedule would be."""

from collections.abc import Sequence

from lightning_hd.processes import Notices

_IN_A_ROW = 12
"""Rates that are written before so many steps in a row are no accident."""

_CUTS = 3
"""Cuts by the same factor, so many times, are the work of ReduceLROnPlateau."""


class Writes:
    """Counts written rates, and warns if they look like a schedule.

    Args:
        notices: Where warnings go.
    """

    def __init__(self, notices: Notices) -> None:
        self._notices = notices
        self._row = 0
        self._last = 0  # the step before which rates were written last
        self._factor = 0.0
        self._cuts = 0

    def see(self, step_count: int, before: Sequence[float], held: Sequence[float]) -> None:
        """Compare the rates of the last step, whose number this is, with others that the groups hold now."""
        factors = [after / lr for lr, after in zip(before, held, strict=True) if lr and after != lr]
        if not factors:
            return
        self._row = self._row + 1 if step_count <= self._last + 1 else 1
        self._last = step_count
        if factors[0] < 1:
            alike = abs(factors[0] - self._factor) < 1e-6 * factors[0]
            self._cuts, self._factor = (self._cuts + 1 if alike else 1), factors[0]
        if self._row >= _IN_A_ROW or self._cuts >= _CUTS:
            self._notices.warn(
                "written rates",
                "learning rates are written into the parameter groups again and again, and tuning goes on from each of "
                "them. If they are a schedule, of your loop or of ReduceLROnPlateau, pass `scheduled=True`. Then they "
                "are multiplied by the learned scale",
            )
