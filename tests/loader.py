"""A data loader that Lightning resumes in mid-epoch."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Resumable:
    """Knows how many batches it has served, as checkpoints must.

    Args:
        epoch: The batches of each epoch, by its number.
    """

    def __init__(self, epoch: Callable[[int], Sequence[Any]]) -> None:
        self.epoch = epoch
        self.served = 0

    def __len__(self) -> int:
        return len(self.epoch(0))

    def __iter__(self) -> Iterator[Any]:
        number, first = divmod(self.served, len(self))
        for batch in self.epoch(number)[first:]:
            self.served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.served = state_dict["served"]
