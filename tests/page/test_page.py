"""The page at / in a real Chromium, before a real server with the demo model: sends, streams, stops, shows errors, draws the pool.

PJAX_SCREENSHOTS=docs/images keeps the pictures that are taken on the way: those of the documentation.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("PJAX_SERVER_PYTHON", str(ROOT / ".venv/bin/python"))
OPTIONS = "--lazy --max-model-len 1024 --max-num-seqs 8 --num-pages 512 --max-num-batched-tokens 128".split()
SCREENSHOTS = os.environ.get("PJAX_SCREENSHOTS")
LONG = "Count from one to one hundred in words."


class Server:
    """`pjax serve` with the demo model, at one port over restarts."""

    def __init__(self, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self._options = options
        self.start()

    def start(self) -> None:
        command = [PYTHON, "-m", "pjax", "serve", "--port", str(self.port), "--drain-seconds", "0", *OPTIONS, *self._options]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(command, env=environment, cwd=ROOT)
        wait(self._is_ready, 180)

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(self.url + "ready", timeout=5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)


def wait(condition: Callable[[], Any], seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it never came to hold"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    assert options.binary_location, "Chromium is missing: apt-get install chromium chromium-driver"
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,860", "--disable-gpu"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Page:
    """The page, as a person uses it."""

    def __init__(self, browser: webdriver.Chrome, url: str) -> None:
        self.browser = browser
        browser.get(url)
        wait(lambda: self.text("link") == "connected")

    def element(self, name: str) -> Any:
        return self.browser.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return str(self.browser.execute_script("return document.getElementById(arguments[0]).textContent", name))

    def set(self, name: str, value: str) -> None:
        script = "document.getElementById('settings').open = true; document.getElementById(arguments[0]).value = arguments[1]"
        self.browser.execute_script(script, name, value)

    def send(self, prompt: str) -> None:
        self.element("prompt").send_keys(prompt, Keys.ENTER)

    def answers(self) -> list[str]:
        return [element.get_attribute("textContent") for element in self.browser.find_elements(By.CSS_SELECTOR, ".turn.answer")]

    def is_busy(self) -> bool:
        return bool(self.element("stop").is_enabled())

    def wait_for_answer(self) -> str:
        wait(lambda: not self.is_busy(), 180)
        return self.answers()[-1]

    def colours(self) -> set[str]:
        """Colours in the pool's drawing, as the style sheet names them."""
        script = """
            const canvas = document.getElementById("pool"), found = new Set();
            const style = getComputedStyle(document.documentElement);
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            const seen = new Set();
            for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) seen.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
            for (const name of ["free", "cached", "one", "shared"])
                if (seen.has(parseInt(style.getPropertyValue("--" + name).trim().slice(1), 16))) found.add(name);
            return [...found]"""
        return set(self.browser.execute_script(script))


@pytest.fixture
def page(browser: webdriver.Chrome, server: Server) -> Iterator[Page]:
    opened = Page(browser, server.url)
    yield opened
    if opened.is_busy():
        opened.element("stop").click()
    wait(lambda: opened.text("running") == "0")
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "status of 4" not in entry["message"]]
    assert not [entry for entry in severe if "ERR_CONNECTION" not in entry["message"]]


def test_an_answer_streams_and_its_tokens_tell_their_probabilities(page: Page) -> None:
    page.set("temperature", "0")
    page.set("max_tokens", "24")
    page.send("What is the capital of France?")
    seen = set()
    wait(lambda: seen.update(page.answers()) or not page.is_busy(), 120)
    assert len(seen) > 3, "the answer came in one piece"
    assert "Paris" in page.answers()[0]
    token = page.browser.find_element(By.CSS_SELECTOR, ".token")
    webdriver.ActionChains(page.browser).move_to_element(token).perform()
    wait(lambda: page.element("tip").is_displayed())
    rows = page.browser.find_elements(By.CSS_SELECTOR, "#tip tr")
    assert 5 <= len(rows) <= 6
    assert rows[0].text.endswith("%")
    token.send_keys(Keys.ARROW_RIGHT)
    focused = page.browser.switch_to.active_element
    assert focused != token and "token" in focused.get_attribute("class")
    assert page.element("tip").is_displayed()
    focused.send_keys(Keys.ESCAPE)
    assert not page.element("tip").is_displayed()


def test_a_conversation_goes_on_and_begins_anew(page: Page) -> None:
    page.set("temperature", "0")
    page.set("max_tokens", "12")
    page.browser.execute_script("""
        const real = fetch;
        window.asked = [];
        window.fetch = (path, options) => { if (options.body) asked.push(JSON.parse(options.body)); return real(path, options); }""")
    for question in ("My name is Ada.", "What is my name?"):
        page.send(question)
        page.wait_for_answer()
    first, second = page.browser.execute_script("return asked.map((body) => body.messages.map((one) => [one.role, one.content]))")
    assert first == [["user", "My name is Ada."]]
    assert second == [*first, ["assistant", page.answers()[0]], ["user", "What is my name?"]]
    page.element("clear").click()
    assert page.answers() == []


def test_a_completion_continues_the_text(page: Page) -> None:
    page.browser.find_element(By.CSS_SELECTOR, ".modes label:last-child").click()
    page.set("temperature", "0")
    page.set("max_tokens", "8")
    page.send("The capital of France is")
    assert "Paris" in page.wait_for_answer()


@pytest.mark.parametrize("by", ["button", "escape"])
def test_stop_frees_the_pages_and_keeps_what_was_said(page: Page, by: str) -> None:
    page.set("max_tokens", "900")
    page.send(LONG)
    wait(lambda: page.answers() and page.answers()[0])
    wait(lambda: page.text("running") == "1")
    if by == "button":
        page.element("stop").click()
    else:
        page.element("prompt").send_keys(Keys.ESCAPE)
    wait(lambda: not page.is_busy())
    said = page.answers()[0]
    wait(lambda: page.text("running") == "0" and page.text("used") == "0%")
    assert said and page.answers() == [said]
    assert page.browser.find_element(By.CSS_SELECTOR, ".turn.end").text == "stopped"


def test_a_refusal_is_shown_and_the_question_comes_back(page: Page) -> None:
    page.set("max_tokens", "5000")
    page.send("Too long an answer")
    wait(lambda: page.element("error").is_displayed())
    assert page.text("error").startswith("400: ")
    assert "max_tokens" in page.text("error") or "1024" in page.text("error")
    assert page.element("prompt").get_attribute("value") == "Too long an answer"
    page.set("max_tokens", "4")
    page.element("send").click()
    page.wait_for_answer()
    assert not page.element("error").is_displayed()


def test_a_wrong_parameter_is_told_before_anything_is_sent(page: Page) -> None:
    page.set("top_p", "7")
    page.send("hello")
    assert page.text("error").startswith("Top p: ")
    assert page.answers() == []


def test_the_pool_is_drawn_with_shared_pages(page: Page) -> None:
    page.set("max_tokens", "400")
    page.set("n", "4")
    page.set("temperature", "1")
    page.send("Tell a long story. " * 12)
    wait(lambda: "shared" in page.colours())
    wait(lambda: int(page.text("shared")) >= 3)
    wait(lambda: {"free", "one", "shared"} <= page.colours())
    assert int(page.text("free")) + int(page.text("cached")) + int(page.text("one")) + int(page.text("shared")) == 512
    assert len(page.answers()) == 4
    page.element("stop").click()
    wait(lambda: page.text("one") == "0" and "cached" in page.colours() and "one" not in page.colours())


def test_text_of_a_model_is_never_markup(page: Page) -> None:
    page.set("max_tokens", "4")
    page.send("<img src=x onerror=\"document.title='broken'\"><b>bold</b>")
    page.wait_for_answer()
    assert not page.browser.find_elements(By.CSS_SELECTOR, "#output img, #output b")
    assert page.browser.title == "pjax"


def test_everything_is_reached_by_keyboard(page: Page) -> None:
    reached = []
    page.browser.execute_script("document.activeElement.blur()")
    for _ in range(24):
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.browser.switch_to.active_element.get_attribute("id"))
    assert {"clear", "output", "prompt", "send"} <= set(reached)


def test_on_a_phone_nothing_is_cut_off(page: Page) -> None:
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 375, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        page.browser.refresh()
        wait(lambda: page.text("link") == "connected")
        assert page.browser.execute_script("return document.documentElement.scrollWidth") == 375
        assert page.element("prompt").rect["width"] > 300
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_an_answer_and_the_page_survive_a_restart(page: Page, server: Server) -> None:
    page.set("max_tokens", "900")
    page.send(LONG)
    wait(lambda: page.answers() and page.answers()[0])
    server.stop()
    wait(lambda: page.element("error").is_displayed() and not page.is_busy())
    wait(lambda: "lost" in page.element("link").get_attribute("class"))
    server.start()
    wait(lambda: page.text("link") == "connected")
    page.set("max_tokens", "4")
    page.send("And now?")
    page.wait_for_answer()
    assert not page.element("error").is_displayed()


@pytest.mark.parametrize("name", ["page-light", "page-dark", "page-phone"])
def test_in_light_dark_and_on_a_phone(page: Page, tmp_path: Path, name: str) -> None:
    """Samples of one prompt side by side, their shared pages in colour, the tip at a token."""
    browser = page.browser
    scheme = "dark" if name == "page-dark" else "light"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    size = {"width": 390, "height": 1500} if name == "page-phone" else {"width": 1280, "height": 820}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "deviceScaleFactor": 1, "mobile": name == "page-phone"})
    try:
        browser.refresh()
        wait(lambda: page.text("link") == "connected")
        page.set("max_tokens", "300")
        page.set("n", "2" if name == "page-phone" else "4")
        page.set("temperature", "0.8")
        page.set("seed", "3")
        browser.execute_script("document.getElementById('settings').open = arguments[0]", name == "page-dark")
        page.send("Explain in a few sentences how a library keeps its books in order, and why that matters to its readers.")
        wait(lambda: page.answers() and min(map(len, page.answers())) > 250, 120)
        wait(lambda: "shared" in page.colours())
        token = browser.find_elements(By.CSS_SELECTOR, ".samples .turn:first-child .token")[20]
        webdriver.ActionChains(browser).move_to_element(token).perform()
        wait(lambda: page.element("tip").is_displayed())
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth"), "wider than the screen"
        assert browser.save_screenshot(str((ROOT / SCREENSHOTS if SCREENSHOTS else tmp_path) / f"{name}.png"))
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
