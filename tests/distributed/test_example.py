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


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.skipif(sys.platform == "win32", reason="gloo processes are started with POSIX semantics")
def test_the_example_takes_the_same_rates_however_it_is_started(nodes: int, tmp_path: Path) -> None:
    (ddp,) = finish([start(tmp_path, str(EXAMPLE), "--processes", "2", "--epochs", "2")])
    if nodes == 2:
        other = run_nodes(tmp_path)
    else:
        (other,) = finish(
            [start(tmp_path, str(EXAMPLE), "--processes", "2", "--epochs", "2", "--strategy", "fully_shard")]
        )
    assert len(rates(ddp)) > 8
    assert rates(ddp) == rates(other)
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 2
