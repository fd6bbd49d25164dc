"""What a user sees: the curves, the charts and the settings of real runs, in TensorBoard, in a browser."""

import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.image import imread
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_hd import HypergradientDescent

pytest.importorskip("selenium", reason="This test drives a browser: pip install selenium.")
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

from tests.browser import PROGRAMS, address, browser, find, tensorboard, until
from tests.test_callback import digits

pytestmark = [
    pytest.mark.skipif(
        not all(map(shutil.which, PROGRAMS)),
        reason="This test drives a browser: apt-get install chromium chromium-driver.",
    ),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

STEPS = 150

CHARTS = {
    "learning rate, log10": {
        "hd/log10_lr-SGD": ["tuned", "untuned", "scheduled"],
        "hd/log10_lr-SGD/pg1": ["groups"],
        "hd/log10_lr-SGD/pg2": ["groups"],
    },
    "learning rate": {
        "hd/lr-SGD": ["tuned", "untuned", "scheduled"],
        "hd/lr-SGD/pg1": ["groups"],
        "hd/lr-SGD/pg2": ["groups"],
        "lr-SGD": ["monitored"],
    },
    "loss": {"train_loss": ["tuned", "untuned", "scheduled", "groups", "monitored"]},
    "effective rate, schedule, scale, log10": {
        "hd/log10_lr-SGD": ["tuned", "untuned", "scheduled"],
        "hd/log10_lr-SGD/pg1": ["groups"],
        "hd/log10_lr-SGD/pg2": ["groups"],
        "hd/log10_schedule-SGD": ["scheduled"],
        "hd/log10_scale-SGD": ["tuned", "untuned", "scheduled", "groups"],
    },
    "cosine and its running mean": {
        "hd/cosine-SGD": ["tuned", "untuned", "scheduled", "groups"],
        "hd/mean_cosine-SGD": ["tuned", "untuned", "scheduled", "groups"],
    },
    "backoffs": {"hd/backoffs-SGD": ["tuned", "scheduled", "groups"]},
}
"""The tags and the runs that each chart of custom scalars shows."""

SETTINGS = {
    "tuned": {"hd/rule": "auto", "hd/max_lr": "None"},
    "untuned": {"hd/rule": "additive", "hd/max_lr": "None"},
    "scheduled": {"hd/rule": "auto", "hd/max_lr": "None"},
    "groups": {"hd/rule": "auto", "hd/max_lr": "0.25000"},
}
"""Some of what the table of hyperparameters shows of each run."""


class Digits(LightningModule):
    def __init__(self, run: str) -> None:
        super().__init__()
        self.run = run
        self.lr = 0.003 if run == "untuned" else 0.01  # at the same rate, it would hide the one without the callback
        self.network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        first, _, last = self.network
        groups: list[dict[str, Any]] = [{"params": first.parameters()}, {"params": last.parameters(), "lr": 0.03}]
        optimizer = SGD(groups if self.run == "groups" else self.parameters(), lr=self.lr, momentum=0.9)
        if self.run != "scheduled":
            return [optimizer], []
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, STEPS), "interval": "step"}]


def fit(folder: Path, run: str, callback: Callback) -> None:
    seed_everything(0, verbose=False)
    data = TensorDataset(*digits())
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=[callback],
        logger=TensorBoardLogger(folder, name="", version=run),
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Digits(run), DataLoader(data, batch_size=64, shuffle=True))


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("HD_SCREENSHOTS", tmp_path / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def driver(tmp_path: Path, screenshots: Path) -> Iterator[WebDriver]:
    """A browser that shows TensorBoard with all runs."""
    runs, output = tmp_path / "runs", tmp_path / "tensorboard.txt"
    fit(runs, "tuned", HypergradientDescent())
    fit(runs, "untuned", HypergradientDescent("additive", hypergrad_lr=0))
    fit(runs, "scheduled", HypergradientDescent())
    fit(runs, "groups", HypergradientDescent(max_lr=0.25))
    fit(runs, "monitored", LearningRateMonitor())
    with tensorboard(runs, output), browser(tmp_path / "profile") as driver:
        driver.get(until(driver, partial(address, output), "TensorBoard"))
        try:
            yield driver
        finally:
            driver.save_screenshot(str(screenshots / "last.png"))


def open_tab(driver: WebDriver, name: str) -> None:
    until(driver, lambda: [tab for tab in find(driver, "[role=tab]") if tab.text == name], name)[0].click()


def cards(driver: WebDriver, kind: str, title: str) -> dict[str, WebElement]:
    """The cards that the page shows, by their titles."""
    shown = filter(WebElement.is_displayed, find(driver, kind))
    return {find(driver, title, card)[0].text.replace("\n", ""): card for card in shown}


def columns_with(color: str, png: bytes) -> float:
    """In which part of the columns of a picture a color is found, which is written ``rgb(1, 2, 3)``."""
    wanted = np.array([int(number) / 255 for number in re.findall(r"\d+", color)[:3]])
    found = np.abs(imread(io.BytesIO(png))[..., :3] - wanted).max(axis=-1) < 0.02
    return float(found.any(axis=0).mean())


def are_drawn(driver: WebDriver, card: WebElement, runs: Sequence[str]) -> bool:
    """Whether a picture of a card shows the lines of these runs only; parts of them may be hidden behind others."""
    png = find(driver, ".series-view", card)[0].screenshot_as_png
    rows = {row.text.split("\n")[0]: row for row in find(driver, "tb-data-table-content-row", card)}
    circles = [find(driver, ".row-circle span", row)[0] for row in rows.values()]
    colors = [circle.value_of_css_property("background-color") for circle in circles]
    return set(rows) == set(runs) and all(columns_with(color, png) > 0.25 for color in colors)


def lines(driver: WebDriver, card: WebElement, tags: Mapping[str, Sequence[str]]) -> list[WebElement]:
    """The lines of a chart of custom scalars, where they are those of these tags and runs only."""
    entries = [str(entry.get_property("textContent")) for entry in find(driver, ".match-list-entry", card)]
    shown = sorted(entry.split(maxsplit=1)[1].strip() for entry in entries)  # behind a symbol
    found = find(driver, ".line-plot:not(.ghost) path.line", card)
    expected = sorted(f"{tag} ({run})" for tag, runs in tags.items() for run in runs)
    return found if shown == expected and len(found) == len(expected) else []


def check_time_series(driver: WebDriver) -> None:
    entry = until(driver, lambda: find(driver, "input[placeholder^='Filter tags']"), "the filter")[0]
    entry.send_keys("lr-SGD|loss$", Keys.ESCAPE)
    expected = {tag: runs for title in list(CHARTS)[:3] for tag, runs in CHARTS[title].items()}
    shown = partial(cards, driver, "scalar-card", "tb-truncated-path")
    until(driver, lambda: set(shown()) == set(expected), "the cards")
    for tag, card in shown().items():
        until(driver, partial(are_drawn, driver, card, expected[tag]), tag)
        for part in find(driver, "tb-truncated-path span", card):
            cut = driver.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", part)
            assert not cut, tag


def check_custom_scalars(driver: WebDriver) -> None:
    shown = partial(cards, driver, "tf-custom-scalar-multi-line-chart-card", "[itemprop=name]")
    until(driver, lambda: list(shown()) == list(CHARTS), "the cards")
    for title, card in shown().items():
        for line in until(driver, partial(lines, driver, card, CHARTS[title]), title):
            assert line.is_displayed()
            assert line.size["width"] > card.size["width"] / 2
            every_step = (line.get_attribute("d") or "").count("L") > STEPS / 2
            assert every_step or title != "learning rate, log10"


def check_hyperparameters(driver: WebDriver) -> None:
    def boxes() -> dict[str, WebElement]:
        panes = find(driver, "tf-hparams-query-pane")
        return {box.text: box for pane in panes for box in find(driver, "paper-checkbox", pane)}

    def table() -> dict[str, dict[str, str]]:
        """What the page shows of each run: cells behind its name, in the order of the columns' names."""
        texts = [line for view in find(driver, "tf-hparams-table-view") for line in view.text.split("\n")]
        starts = [i for i, text in enumerate(texts) if text in SETTINGS]
        columns = texts[texts.index("Show Metrics") + 1 : starts[0]] if starts else []
        rows = {texts[i]: dict(zip(columns, texts[i + 1 :], strict=False)) for i in starts}
        return {run: {name: row.get(name, "") for name in SETTINGS[run]} for run, row in rows.items()}

    names = SETTINGS["tuned"]
    until(driver, lambda: set(names) <= set(boxes()), "the settings")
    for name in names:
        if not boxes()[name].get_attribute("checked"):
            boxes()[name].click()
    until(driver, lambda: table() == SETTINGS, "the table")


def test_a_user_sees_curves_charts_and_settings_in_tensorboard(driver: WebDriver, screenshots: Path) -> None:
    for tab, check in (
        ("TIME SERIES", check_time_series),
        ("CUSTOM SCALARS", check_custom_scalars),
        ("HPARAMS", check_hyperparameters),
    ):
        open_tab(driver, tab)
        check(driver)
        driver.save_screenshot(str(screenshots / f"{tab.lower().replace(' ', '_')}.png"))
