"""TensorBoard and a browser that looks at it: real processes, ended by their ids."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

T = TypeVar("T")

PROGRAMS = ("chromium", "chromedriver")

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-3d-apis",  # drawn by the CPU, WebGL takes seconds; without it TensorBoard draws in SVG
    "--window-size=1500,2000",
)

_FIND = """
const trees = (root) => {
    const hosts = [root, ...root.querySelectorAll("*")].filter((node) => node.shadowRoot);
    return [root, ...hosts.flatMap((host) => trees(host.shadowRoot))];
};
return trees(arguments[1] ?? document).flatMap((tree) => [...tree.querySelectorAll(arguments[0])]);
"""


@contextmanager
def browser(profile: Path) -> Iterator[Chrome]:
    """A headless Chromium with an empty profile."""
    # Both paths are given, so that Selenium does not look for programs to download.
    binary, driver = map(shutil.which, PROGRAMS)
    options = ChromeOptions()
    options.binary_location = str(binary)
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    chrome = Chrome(options, ChromeService(str(driver)))
    ids: list[int] = []
    try:
        ids += [chrome.service.process.pid, chrome.capabilities["goog:processID"]]
        yield chrome
    finally:
        chrome.quit()
        left = [process for process in ids if _runs(process)]
        for process in left:
            os.kill(process, signal.SIGKILL)
        assert not left


@contextmanager
def tensorboard(runs: Path, output: Path) -> Iterator[None]:
    """TensorBoard at a free port, which it writes into the output."""
    # It loads all runs before it serves the first page, for the page does not reload by itself.
    loading = ["--load_fast", "false", "--reload_interval", "0", "--reload_task", "blocking"]
    address = ["--host", "127.0.0.1", "--port", "0"]
    with output.open("w") as file:
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), *address, *loading]
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        server.terminate()
        try:
            server.wait(20)
        finally:
            server.kill()  # of one that is gone already: nothing
            server.wait()
        assert not _runs(server.pid)


def address(output: Path) -> str:
    """Where TensorBoard says that it serves; empty as long as it does not."""
    found = re.search(r"http://127\.0\.0\.1:\d+/", output.read_text())
    return found.group() if found else ""


def until(driver: WebDriver, condition: Callable[[], T], what: str) -> T:
    """Wait until a condition holds, and return what it does; look again where the page has changed meanwhile."""
    wait = WebDriverWait(driver, 60, poll_frequency=0.1, ignored_exceptions=[StaleElementReferenceException])
    return wait.until(lambda _: condition(), what)


def find(driver: WebDriver, css: str, inside: WebElement | None = None) -> list[WebElement]:
    """All elements that match, also those in shadow trees, which Selenium does not search."""
    found: list[WebElement] = driver.execute_script(_FIND, css, inside)
    return found


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
