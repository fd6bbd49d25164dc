"""The documentation site as a reader sees it: every page, in a browser, as wide as a screen and as a phone."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="This test drives a browser: pip install selenium.")
pytest.importorskip("mkdocs_autorefs", reason="This test builds the site: pip install -e '.[docs]'.")
from selenium.webdriver import Chrome

from tests.browser import PROGRAMS, browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, PROGRAMS)),
        reason="This test drives a browser: apt-get install chromium chromium-driver.",
    ),
]

ROOT = Path(__file__).parent.parent
SCREEN, PHONE = 1280, 390

WIDE = """
const tables = [...document.querySelectorAll(".md-typeset__table")];
return tables.filter((table) => table.scrollWidth > table.parentElement.clientWidth + 1);
"""
"""The tables that do not fit."""

BROKEN = r"""
const words = [], range = document.createRange();
const texts = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
    const node = texts.currentNode;
    if (node.parentElement.closest("pre, math, script, .headerlink")) continue;
    for (const found of node.data.matchAll(/[\p{L}\p{N}]+/gu)) {
        range.setStart(node, found.index);
        range.setEnd(node, found.index + found[0].length);
        if (new Set([...range.getClientRects()].map((box) => Math.round(box.top))).size > 1) words.push(found[0]);
    }
}
return words;
"""
"""The words that a line ends in the middle of."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as driver:
        yield driver


@pytest.mark.parametrize("width", [SCREEN, PHONE])
def test_pages_fit_and_no_word_is_broken(width: int, site: Path, driver: Chrome) -> None:
    device = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    faults = []
    for page in sorted(site.rglob("index.html")):
        driver.get(page.as_uri())
        name = page.parent.relative_to(site)
        if driver.execute_script("return document.documentElement.scrollWidth") > width:
            faults.append(f"{name} is wider than {width}")
        if words := driver.execute_script(BROKEN):
            faults.append(f"{name} breaks {', '.join(words)}")
        if width == SCREEN and (tables := driver.execute_script(WIDE)):
            faults += [f"{name}: a table does not fit: {table.text.splitlines()[0]}" for table in tables]
    assert not faults, "\n".join(faults)
