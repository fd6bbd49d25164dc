"""Counts the times that others have written learning rates into the parameter groups, without a schedule."""

from lightning_hd.processes import Notices


class Writes:
    """Counts written rates, and warns at the second: one may be a correction, several are a schedule.

    Args:
        notices: Where the warning goes.
    """

    def __init__(self, notices: Notices) -> None:
        self._notices = notices
        self.count = 0  # steps before which rates were written

    def see(self) -> None:
        """Note that rates were written since the last step."""
        self.count += 1
        if self.count == 2:
            self._notices.warn(
                "written rates",
                "learning rates were written into the parameter groups again, and each took the place of the learned "
                f"one. If they are a schedule, pass {self._notices.owner}(scheduled=True). Then they are multiplied by "
                "the learned scale",
            )
