"""What the reduction over processes adds to a step.

    python tests/benchmarks/scaling.py            # a quarter of an hour on two cores, 12 GB

Processes on this machine, over gloo, each with a copy of the parameters in ten tensors, take steps of Adam: plain, then
with the rule "auto" by turns for each process alone and with hypergradients summed over all of them. The table has the
median time of a step of each kind, what summing adds to a process alone, and that in percent; the collectives of a step
and their bytes are counted by torch's profiler. With more processes than cores they wait for each other's turn, which
counts as well.
"""

import argparse
import gc
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
from torch.optim import Adam
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for those who run the file by its path

from lightning_hd import HypergradientLR
from tests.distributed.processes import run

PARAMETERS = (100_000, 1_000_000, 10_000_000, 100_000_000)
PROCESSES = (1, 2, 4)
TENSORS = 10
KINDS = ("plain", "alone", "together")


class Cost(NamedTuple):
    """Of one step: milliseconds of each kind, collectives, and their bytes."""

    plain: float
    alone: float
    together: float
    collectives: int
    payload: int


def optimizer_of(kind: str, parameters: int, own: dist.ProcessGroup) -> Adam:
    p = [nn.Parameter(torch.ones(parameters // TENSORS)) for _ in range(TENSORS)]
    for tensor in p:
        tensor.grad = torch.ones_like(tensor)
    optimizer = Adam(p)
    if kind != "plain":
        HypergradientLR(optimizer, process_group=own if kind == "alone" else None)
    return optimizer


def measure(parameters: int, rounds: int) -> Cost:
    """On one of the processes."""
    own = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    assert isinstance(own, dist.ProcessGroup)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(2):
        for kind in KINDS:
            optimizer = None
            gc.collect()  # an optimizer and what is hooked to it refer to each other
            optimizer = optimizer_of(kind, parameters, own)
            for i in range(rounds + 2):
                dist.barrier()
                begin = time.perf_counter()
                optimizer.step()
                if i >= 2:
                    times[kind].append(1e3 * (time.perf_counter() - begin))
    assert optimizer is not None
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        optimizer.step()
    sent = [event for event in profiler.events() or () if event.name == "gloo:all_reduce"]
    payload = sum(8 * int(torch.tensor(shape).prod()) for event in sent for shape in event.input_shapes if shape)
    plain, alone, together = (median(times[kind]) for kind in KINDS)
    return Cost(plain, alone, together, len(sent), payload)


def at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--parameters", PARAMETERS), ("--processes", PROCESSES)):
        parser.add_argument(name, type=at_least_one, nargs="+", default=default, help="default: %(default)s")
    parser.add_argument(
        "--rounds", type=at_least_one, default=10, help="steps of each kind, twice (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if min(arguments.parameters) < TENSORS:
        parser.error(f"--parameters: there are {TENSORS} tensors, got {min(arguments.parameters)}")
    lines = [
        f"{os.cpu_count()} cores, times in ms\n",
        "| parameters | processes | plain | alone | together | added | added, % | collectives | bytes |",
        "|---" * 9 + "|",
    ]
    for parameters in arguments.parameters:
        for count in arguments.processes:
            results = run(measure, count, parameters, arguments.rounds, timeout_s=600)
            failed = [result for result in results if not isinstance(result, Cost)]
            if failed:
                raise RuntimeError(f"a process failed: {failed[0]!r}")
            plain, alone, together, collectives, payload = max(results, key=lambda cost: cost.together)
            added = together - alone
            lines.append(
                f"| {parameters:.0e} | {count} | {plain:.2f} | {alone:.2f} | {together:.2f} "
                f"| {added:.2f} | {100 * added / alone:.1f} | {collectives} | {payload} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
