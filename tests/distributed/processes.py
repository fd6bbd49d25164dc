"""Real processes for tests: gloo on loopback, joined with a time-out, their results by rank."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def preload() -> None:
    """Let the server that forks processes import what nearly all of them do: it takes seconds, but only once."""
    multiprocessing.set_forkserver_preload(["tests.distributed.training", "tests.test_callback"])


def run(worker: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240) -> list[Any]:
    """What ``worker(*args)`` returns on each rank, the exception that it raised, or ``None`` of a rank that was killed.

    Raises:
        TimeoutError: A process did not end in time; all are killed then.
    """
    preload()
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_work, args=(worker, rank, world_size, folder, args)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(timeout_s)
                if process.is_alive():
                    raise TimeoutError(f"a process did not end within {timeout_s} s")
        finally:
            for process in processes:
                process.kill()
        results = [Path(folder) / str(rank) for rank in range(world_size)]
        return [torch.load(path, weights_only=False) if path.exists() else None for path in results]


def tell_lightning() -> None:
    """Set the variables that Lightning's ``TorchElasticEnvironment`` reads, as torchrun does."""
    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(dist.get_world_size()))


def _work(worker: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    try:
        result = worker(*args)
    except BaseException as error:  # such as torch's CheckpointException
        traceback.print_exc()
        result = error if isinstance(error, Exception) else RuntimeError(repr(error))
    torch.save(result, Path(folder) / str(rank))
    dist.destroy_process_group()
