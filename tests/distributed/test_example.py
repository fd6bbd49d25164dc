"""The example, as users start it: by itself, with copies or shards, or on two nodes."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from tests.distributed.processes import run, tell_lightning

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo processes are started with POSIX semantics")

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


def run_ways(path: Path) -> list[str]:
    """What this process prints, on processes that look as if torchrun had started them, on one node or on two."""
    tell_lightning()
    os.environ.update(TORCHELASTIC_RUN_ID="none", TORCHELASTIC_RESTART_COUNT="0")
    outputs = []
    for local, *options in (
        (os.environ["RANK"], "--processes", "2", "--strategy", "fully_shard"),
        (os.environ["RANK"], "--processes", "2", "--strategy", "ddp"),
        ("0", "--processes", "1", "--nodes", "2"),
    ):
        os.environ["LOCAL_RANK"] = local
        sys.argv = [str(EXAMPLE), "--epochs", "2", "--folder", str(path), *options]
        output = io.StringIO()
        # The next way needs the group of all processes again.
        with mock.patch.object(dist, "destroy_process_group") as destroy, contextlib.redirect_stdout(output):
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        destroy.assert_called_once_with()
        outputs.append(output.getvalue())
    return outputs


def ways(path: Path) -> list[str]:
    first, second = run(run_ways, 2, path)
    for rank in (first, second):
        assert not isinstance(rank, Exception), rank
    assert second == [""] * len(first), "the first process alone prints"
    assert len(list(path.rglob("events.out.tfevents.*"))) == len(first)
    return [*first]


def test_the_example_takes_the_same_rates_however_it_is_started(tmp_path: Path) -> None:
    found = [rates(output) for output in ways(tmp_path)]
    assert len(found[0]) > 8
    assert all(own == found[0] for own in found)


@pytest.mark.slow
def test_the_example_that_starts_its_processes_itself_takes_the_same_rates(tmp_path: Path) -> None:
    script = [str(EXAMPLE), "--processes", "2", "--epochs", "2", "--strategy", "fully_shard"]
    (output,) = finish([start(tmp_path, *script)])
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 1
    assert rates(output) == rates(ways(tmp_path / "others")[0])
