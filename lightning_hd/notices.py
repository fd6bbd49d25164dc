"""Warnings, one of each kind, and log messages, on the first of the processes that train together."""

import logging
import warnings

from lightning_hd.processes import Ranks

_log = logging.getLogger("lightning_hd")


class Notices:
    """Warnings and log messages about one optimizer.

    Args:
        name: The name that messages begin with.
        ranks: The processes.
    """

    def __init__(self, name: str, ranks: Ranks) -> None:
        self._name = name
        self._ranks = ranks
        self._given: set[str] = set()

    def warn(self, kind: str, message: str) -> None:
        """Warn, unless there was a warning of that kind before."""
        if kind not in self._given and self._ranks.is_first:
            warnings.warn(f"{self._name}: {message}", RuntimeWarning, stacklevel=3)
        self._given.add(kind)

    def log(self, message: str) -> None:
        """Write a message to the log."""
        if self._ranks.is_first:
            _log.info("%s: %s", self._name, message)
