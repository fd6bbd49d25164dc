"""Learning rates that others write into the parameter groups between steps, one after another."""

from collections.abc import Sequence

from lightning_hd.notices import Notices

_IN_A_ROW = 12
"""So many steps in a row before which a rate was written are no accident."""

_CUTS = 3
"""So many times the same factor below 1 is what ReduceLROnPlateau does."""


class Writes:
    """Counts them, and warns where they look like a schedule.

    Args:
        notices: For what the user should know.
    """

    def __init__(self, notices: Notices) -> None:
        self._notices = notices
        self._row = 0
        self._factor = 0.0
        self._cuts = 0

    def see(self, before: Sequence[float], held: Sequence[float]) -> None:
        """Before a step: the rates of the last one, and those that the groups hold now."""
        factors = [after / lr for lr, after in zip(before, held, strict=False) if lr and after != lr]
        if not factors:
            self._row = 0
            return
        self._row += 1
        if factors[0] < 1:
            alike = abs(factors[0] - self._factor) < 1e-6 * factors[0]
            self._cuts, self._factor = (self._cuts + 1 if alike else 1), factors[0]
        if self._row >= _IN_A_ROW or self._cuts >= _CUTS:
            self._notices.warn(
                "written rates",
                "learning rates are written into the parameter groups again and again, and tuning goes on from each of "
                "them. If they are a schedule, of your loop or of ReduceLROnPlateau, say so by `scheduled = True`: "
                "then they are multiplied by what is learned",
            )
