"""The benchmark for a GPU runs in all its parts on a CPU, too."""

from pathlib import Path

from tests.benchmarks.gpu import main


def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    main(["--out", str(tmp_path), "--device", "cpu", "--tiny"])
    lines = (tmp_path / "gpu.md").read_text(encoding="utf8").splitlines()
    assert lines[0].startswith("waits for the device: 1 in an early step")
    tables = [line for line in lines if line.startswith("|")]
    assert sum("eager" in line or "compiled" in line for line in tables) == 6
    assert [line.split("|")[1].strip() for line in tables[-3:]] == [
        "warm-up and cosine, 0.0003",
        "warm-up and cosine, 0.001",
        "auto",
    ]
