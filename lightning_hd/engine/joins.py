"""``DistributedDataParallel.join()``, for processes that run out of data before others. It is refused."""

import gc
from collections.abc import Iterable

from torch import Tensor
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel


def check_joins(parameters: Iterable[Tensor]) -> None:
    """Raise ``RuntimeError`` within a ``join()`` of a model with these parameters.

    A process that has run out of data takes part in the collectives of the model only. Ours would wait for it forever.
    """
    own = set(parameters)
    # torch has no public way to ask whether such a context is open, nor for which models. So this looks at all objects,
    # once. It asks for their types, because `isinstance` would ask weak proxies, whose objects may be gone.
    for join in (thing for thing in gc.get_objects() if issubclass(type(thing), Join)):
        ends_all = join._throw_on_early_termination or not join._enable
        models = [model for model in join._joinables if isinstance(model, DistributedDataParallel)]
        if not ends_all and any(p in own for model in models for p in model.parameters()):
            raise RuntimeError(
                "DistributedDataParallel.join() is not supported: a process that has run out of data takes no part in "
                "the sums for the learning rate. Give all processes as many batches (a DistributedSampler does), or "
                "call join(throw_on_early_termination=True)"
            )
