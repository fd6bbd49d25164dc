"""The pictures of the documentation: one made from its runs, and all where they are shown."""

import logging
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_hd.reporting import load, plot, save

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "pictures"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    """What docs/pictures.py defines; what it sets for the whole process is set back afterwards."""
    caplog.set_level(logging.ERROR, "lightning.pytorch")
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")
    return runpy.run_path(str(ROOT / "docs" / "pictures.py"))


def shown(page: Path) -> list[Path]:
    """The files of a page's pictures."""
    links = re.findall(r"!\[[^\]]*\]\(([^)\s]+)", page.read_text("utf8"))
    return [(page.parent / link).resolve() for link in links if "://" not in link]


def test_a_picture_shows_what_its_runs_have_logged(pictures: dict[str, Any], tmp_path: Path) -> None:
    pictures["main"](["climb", "-o", str(tmp_path / "pictures")])
    (file,) = (tmp_path / "pictures").iterdir()
    assert file.name == "climb.png"
    assert file.stat().st_size < 40_000

    pictures["PICTURES"]["climb"].make(tmp_path / "runs")
    auto, constant = load([tmp_path / "runs"])
    assert (auto.name, constant.name) == ("auto", "constant 1e-5")
    steps, rates = auto.rates["SGD"]
    assert list(steps) == list(range(150))
    assert max(rates) > 100 * rates[0]
    assert list(constant.rates["SGD"][1]) == pytest.approx([1e-5] * 150)
    cosines = auto.cosines["SGD"][1]
    assert np.mean(cosines[:15]) > 0.3 > 0.1 > abs(np.mean(cosines[-50:]))
    assert not constant.cosines
    assert auto.loss is not None
    assert constant.loss is not None
    assert np.mean(auto.loss[1][-50:]) < 0.2 * np.mean(constant.loss[1][-50:])

    save(plot([tmp_path / "runs"]), tmp_path / "drawn.png")
    drawn = np.asarray(Image.open(tmp_path / "drawn.png").convert("L").reduce(2), dtype=float)
    made = np.asarray(Image.open(file).convert("L"), dtype=float)
    assert drawn.std() > 10
    assert np.abs(made - drawn).mean() < 1


def test_a_name_that_is_none_is_refused(pictures: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        pictures["main"](["climb", "clmb"])
    assert "there is no picture clmb" in capsys.readouterr().err


def test_every_picture_is_made_and_shown(pictures: dict[str, Any]) -> None:
    linked = [path for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) for path in shown(page)]
    assert [path for path in linked if not path.is_file()] == []
    made = {FOLDER / f"{name}.png" for name in pictures["PICTURES"]}
    assert set(FOLDER.iterdir()) == made
    assert {path for path in linked if path.parent == FOLDER} == made
    assert all(path.stat().st_size < 40_000 for path in made)
