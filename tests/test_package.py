"""The package as others get it: a wheel, its public names, its documentation, its example."""

import doctest
import inspect
import operator
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Callback

import lightning_hd
import lightning_hd.engine.tuner
import lightning_hd.reporting
from lightning_hd import HypergradientDescent, HypergradientLR

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


SMOKE = """
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
import lightning_hd

class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)

hd = lightning_hd.HypergradientDescent()
trainer = Trainer(callbacks=[hd], max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(Line(), DataLoader(TensorDataset(torch.randn(800, 3)), batch_size=8))
assert hd.lrs["lr-SGD"][60] > 1e-3, hd.lrs
print(lightning_hd.__file__, lightning_hd.__version__)
"""


def test_the_wheel_that_is_built_from_the_sdist_trains(tmp_path: Path) -> None:
    run("-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT), cwd=tmp_path)
    (wheel,) = tmp_path.glob("lightning_hd-*.whl")
    (sdist,) = tmp_path.glob("lightning_hd-*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert {"README.md", "CITATION.cff", "LICENSE"} <= {Path(name).name for name in archive.getnames()}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "lightning_hd/py.typed" in names
    assert not any(name.startswith(("tests/", "examples/", "docs/")) for name in names)
    site = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=tmp_path)
    where, version = run("-c", SMOKE, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()[-1].split()
    assert Path(where).is_relative_to(site)
    assert version == lightning_hd.__version__


def test_public_names_are_those_of_the_documentation() -> None:
    documented = {
        line.split()[1]
        for page in (ROOT / "docs" / "api").glob("*.md")
        for line in page.read_text().splitlines()
        if line.startswith("::: ")
    }
    figures = {"Curves", "PlotError", "figure", "load", "plot", "save"}
    names = {*lightning_hd.__all__, *(f"reporting.{name}" for name in figures)}
    assert documented == {f"lightning_hd.{name}" for name in names}
    assert figures <= set(lightning_hd.reporting.__all__)
    for name in names:
        assert operator.attrgetter(name)(lightning_hd).__doc__


def test_the_engine_and_the_callback_have_the_documented_members_only() -> None:
    engine = {"lrs", "scales", "last", "step_count", "paused", "scheduled", "stats"}
    engine |= {"observe", "suggestion", "detach", "state_dict", "load_state_dict"}
    optimizer = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
    assert {name for name in dir(HypergradientLR(optimizer)) if not name.startswith("_")} == engine
    page = (ROOT / "docs" / "api" / "callback.md").read_text()
    hooks = {name for name in dir(Callback) if not name.startswith("_")}
    settings = set(inspect.signature(HypergradientDescent).parameters)
    own = {name for name in dir(HypergradientDescent()) if not name.startswith("_")} - hooks - settings
    assert f"members: [{', '.join(name for name in ('engines', 'lrs', 'suggestion', 'plot') if name in own)}]" in page
    assert own == {"engines", "lrs", "suggestion", "plot"}


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(\d.*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert citation["version"] == newest[1] == lightning_hd.__version__ == version("lightning-hd")


def test_the_comparison_names_measured_figures_only() -> None:
    named, measured = (
        set(re.findall(r"\d+\.\d+", (ROOT / "docs" / page).read_text().replace("version 0.1.0", "")))
        for page in ("comparison.md", "benchmarks.md")
    )
    assert named
    assert named <= measured


def test_the_example_in_the_docstring() -> None:
    results = doctest.testmod(lightning_hd.engine.tuner)
    assert results.attempted > 0
    assert results.failed == 0
