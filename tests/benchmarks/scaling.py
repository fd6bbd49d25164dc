"""What the reduction over processes adds to a step.

    python tests/benchmarks/scaling.py            # about ten minutes on two cores, 12 GB

Processes on this machine, over gloo, each with a copy of the parameters, take steps of Adam with the rule "auto": by
turns with each alone, and with hypergradients summed over all of them. The table has the median time of a step of each
kind, the difference, and that as a part of the step of a process alone; the collectives of a step and their bytes are
counted by torch's profiler. With more processes than cores they wait for each other's turn, which counts as well.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for those who run the file by its path

from lightning_hd import HypergradientLR
from tests.distributed.processes import run

PARAMETERS = (100_000, 1_000_000, 10_000_000, 100_000_000)
PROCESSES = (1, 2, 4)
TENSORS = 10


class Cost(NamedTuple):
    """Of one step: seconds with and without the reduction, collectives, and their bytes."""

    together: float
    alone: float
    collectives: int
    payload: int


def measure(parameters: int, rounds: int) -> Cost:
    """On one of the processes."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    own = groups[dist.get_rank()]
    assert isinstance(own, dist.ProcessGroup)
    times: list[list[float]] = [[], []]
    for _ in range(2):
        for group, seconds in zip((own, None), times, strict=True):
            p = [nn.Parameter(torch.ones(parameters // TENSORS)) for _ in range(TENSORS)]
            optimizer = torch.optim.Adam(p)
            HypergradientLR(optimizer, process_group=group)
            for tensor in p:
                tensor.grad = torch.ones_like(tensor)
            for i in range(rounds + 2):
                dist.barrier()
                begin = time.perf_counter()
                optimizer.step()
                if i >= 2:
                    seconds.append(time.perf_counter() - begin)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        optimizer.step()
    sent = [event for event in profiler.events() or () if event.name == "gloo:all_reduce"]
    payload = sum(8 * int(torch.tensor(shape).prod()) for event in sent for shape in event.input_shapes if shape)
    return Cost(median(times[1]), median(times[0]), len(sent), payload)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--parameters", type=int, nargs="+", default=PARAMETERS, metavar="N")
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES, metavar="N")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each kind, twice (default: %(default)s)")
    arguments = parser.parse_args(argv)
    print(f"{os.cpu_count()} cores\n")
    print("| parameters | processes | together, ms | alone, ms | added, ms | added, % | collectives | bytes |")
    print("|---" * 8 + "|")
    for parameters in arguments.parameters:
        for count in arguments.processes:
            results = run(measure, count, parameters, arguments.rounds, timeout_s=600)
            failed = [result for result in results if not isinstance(result, Cost)]
            if failed:
                raise RuntimeError(f"a process failed: {failed[0]!r}")
            worst = max(results, key=lambda cost: cost.together)
            added = worst.together - worst.alone
            print(
                f"| {parameters:.0e} | {count} | {1e3 * worst.together:.2f} | {1e3 * worst.alone:.2f} "
                f"| {1e3 * added:.2f} | {100 * added / worst.alone:.1f} | {worst.collectives} | {worst.payload} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
