"""Small tables on the device, which are not copied from the host in every step."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from lightning_hd.processes import exact_dtype

_KEPT = 16
"""How many tables are kept. A step needs a few, which seldom change."""


class Tables:
    """Constants of the steps. They are made anew only when their numbers change."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Tensor] = {}

    def constant(self, numbers: Sequence[float], device: torch.device) -> Tensor:
        """A vector of these numbers."""
        key = tuple(numbers)
        return self._get((key, device), lambda: torch.tensor(key, dtype=exact_dtype(device), device=device))

    def combine(
        self,
        sums: Sequence[Tensor],
        factors: Sequence[tuple[float, ...]],
        flags: Sequence[tuple[bool, bool, bool]],
        device: torch.device,
        width: int,
    ) -> Tensor:
        """Sum the numbers of the buckets by scope.

        Args:
            sums: The numbers of each bucket, of shape (width,). A process without elements has no bucket.
            factors: The scope of each bucket, and the factors of its numbers.
            flags: Three flags for each scope.
            device: The device for the sums.
            width: How many numbers a bucket has.

        Returns:
            The sums and the three flags of each scope, of shape (scopes, width + 3).
        """

        def spread() -> Tensor:
            table = torch.zeros(len(flags), len(factors), width, dtype=exact_dtype(device))
            for i, (scope, *own) in enumerate(factors):
                table[int(scope), i] = torch.tensor(own, dtype=table.dtype)
            return table.to(device)

        of_scopes = self.constant([float(flag) for own in flags for flag in own], device).view(-1, 3)
        table = self._get((tuple(factors), len(flags), width, device), spread)
        if sums:
            table = table * torch.stack([own.to(device) for own in sums])
        return torch.cat([table.sum(1), of_scopes], dim=1)

    def _get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._known:
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[key] = make()
        return self._known[key]
