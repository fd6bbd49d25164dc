"""The package as others get it: a wheel, its public names, its documentation, its example."""

import doctest
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import lightning_hd
import lightning_hd.hypergradient

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout


def test_a_built_wheel_installs_and_imports(tmp_path: Path) -> None:
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT), cwd=tmp_path)
    (wheel,) = tmp_path.glob("lightning_hd-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "lightning_hd/py.typed" in names
    assert not any(name.startswith(("tests/", "examples/")) for name in names)
    site = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=tmp_path)
    where = run("-c", "import lightning_hd; print(lightning_hd.__file__)", cwd=tmp_path, PYTHONPATH=str(site))
    assert Path(where.strip()).is_relative_to(site)


def test_public_names_are_documented() -> None:
    for name in lightning_hd.__all__:
        assert getattr(lightning_hd, name).__doc__


def test_the_example_in_the_docstring() -> None:
    results = doctest.testmod(lightning_hd.hypergradient)
    assert results.attempted > 0
    assert results.failed == 0


def test_the_quickstart_repairs_a_bad_rate(tmp_path: Path) -> None:
    output = run(str(ROOT / "examples" / "quickstart.py"), "--figure", "lr.png", cwd=tmp_path, MPLBACKEND="Agg")
    rows = {line[:22].strip(): [float(x) for x in line[22:].split()] for line in output.splitlines() if "e-05" in line}
    assert rows["without"][0] < 0.5
    accuracy, loss, first, usual = rows["HypergradientDescent"]
    assert accuracy > 0.95
    assert loss < 0.2
    assert first == 1e-5
    assert usual > 1e-3
    assert "tensorboard --logdir runs/quickstart" in output
    assert {file.parent.name for file in tmp_path.rglob("events.out.tfevents.*")} == {"plain", "hypergradient"}
    assert (tmp_path / "lr.png").stat().st_size > 1000
