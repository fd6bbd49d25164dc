"""The example, as users start it: by itself, sharded, or on two nodes."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "ddp.py"


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def start(path: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], cwd=path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def rates(output: str) -> list[str]:
    assert "2 processes, equal bit for bit" in output
    found = re.search(r"learning rates of \d+ steps, each \d+th: (.*)", output)
    assert found is not None
    return found[1].split(", ")


def run_nodes(path: Path) -> str:
    """What the first of two nodes prints that torchrun has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", "1", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    script = [str(EXAMPLE), "--processes", "1", "--nodes", "2", "--epochs", "2"]
    host = ["--local-addr", "127.0.0.1"]
    nodes = finish([start(path, *torchrun, *rendezvous, *host, *script) for _ in range(2)])
    (first,) = (output for output in nodes if "learning rates of" in output)
    return first


def run_strategy(path: Path, strategy: str) -> str:
    (output,) = finish([start(path, str(EXAMPLE), "--processes", "2", "--epochs", "2", "--strategy", strategy)])
    return output


@pytest.mark.skipif(sys.platform == "win32", reason="gloo processes are started with POSIX semantics")
@pytest.mark.parametrize("way", ["sharded", pytest.param("all", marks=pytest.mark.slow)])
def test_the_example_takes_the_same_rates_however_it_is_started(way: str, tmp_path: Path) -> None:
    outputs = [run_strategy(tmp_path, "fully_shard")]
    if way == "all":
        outputs += [run_strategy(tmp_path, "ddp"), run_nodes(tmp_path)]
    assert len(rates(outputs[0])) > 8
    assert all(rates(output) == rates(outputs[0]) for output in outputs)
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == len(outputs)
