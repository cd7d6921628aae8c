"""The chat page: one file that fetches nothing, and what it does in a browser.

The long form drives a real Chromium through its debugging pipe, against a real server; it is left
out where there is none.
"""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import myna.inference.server
from served import Served, make_runs, serve_runs

PAGE = Path(myna.inference.server.__file__).parent / "page.html"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class _Reader(HTMLParser):
    """Collects what would be fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_the_page_fetches_nothing_from_elsewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    reader = _Reader()
    reader.feed(text)
    names = {name for name, _ in reader.attributes}
    assert not names & {"src", "href", "action", "srcset", "style", "onclick", "onload"}
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(reader.tags)
    assert reader.tags.count("script") == reader.tags.count("style") == 1
    assert "//" not in text.replace("// ", "")
    assert "url(" not in text
    assert "@import" not in text


def test_texts_get_into_the_page_as_text_and_the_key_into_the_tab_only() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function("):
        assert way not in text
    assert "localStorage" not in text
    assert "cookie" not in text
    assert text.count("sessionStorage.setItem") == 1


class Browser:
    """A page in Chromium, spoken to as its developer tools do."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        to_browser, self._requests = os.pipe()
        self._answers, from_browser = os.pipe()
        # The browser wants them as 3 and 4; others keep clear of these numbers meanwhile.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (to_browser, from_browser)]
        os.close(to_browser)
        os.close(from_browser)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
        flags += ["--disable-background-networking", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", CHROMIUM, *flags],
            pass_fds=ends,
            stderr=subprocess.DEVNULL,
        )
        for end in ends:
            os.close(end)
        self._numbers = itertools.count(1)
        self._rest = b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def open(self, url: str, width: int = 1000, height: int = 760) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for part in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{part}.enable")
        self.resize(width, height)
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._requests, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def evaluate(self, code: str) -> Any:
        result = self.call(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        met = f"""new Promise((done) => {{
          const until = performance.now() + 20000;
          const look = () => ({condition}) ? done(true)
            : performance.now() > until ? done(false) : setTimeout(look, 20);
          look();
        }})"""
        assert self.evaluate(met), (condition, self.evaluate("document.body.innerText"))

    def type(self, text: str) -> None:
        self.evaluate("document.getElementById('question').focus()")
        self.call("Input.insertText", text=text)

    def press_enter(self) -> None:
        for kind in ("rawKeyDown", "char", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                code="Enter",
                windowsVirtualKeyCode=13,
                text="\r" if kind == "char" else "",
            )

    def screenshot(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def asked(self) -> set[str]:
        """Addresses that the page asked for."""
        return {
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        }

    def complaints(self) -> list[dict[str, Any]]:
        """Errors on the page's console, refusals of the content policy among them."""
        return [
            event["params"]
            for event in self.events
            if event["method"] == "Runtime.exceptionThrown"
            or (
                event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error"
            )
        ]

    def close(self) -> None:
        with contextlib.suppress(OSError, AssertionError, StopIteration):
            self._session = None
            self.call("Browser.close")
        self._process.wait(timeout=20)
        os.close(self._requests)
        os.close(self._answers)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._answers, 1 << 16)
            if not block:
                raise AssertionError("the browser ended")
            self._rest += block
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH")
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    runs = make_runs(tmp_path_factory.mktemp("page"), "one", "two")
    with serve_runs(runs) as server:
        yield server


@pytest.mark.full
def test_a_conversation_in_a_browser(browser: Browser, served: Served) -> None:
    browser.open(served.url)
    browser.wait_for("!document.getElementById('model').disabled")
    names = browser.evaluate("[...document.getElementById('model').options].map((o) => o.value)")
    assert set(names) == {"base", "one", "two"}
    assert browser.evaluate("document.getElementById('model').value") != "base"

    # Enter that chooses a word of an input method does not send.
    browser.type("你好<img src=x onerror=alert(1)>")
    browser.evaluate(
        "document.getElementById('question').dispatchEvent(new KeyboardEvent('keydown', "
        "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    assert browser.evaluate("document.querySelectorAll('article').length") == 0
    browser.press_enter()
    browser.wait_for("document.querySelector('article.assistant .note')")
    assert browser.evaluate("document.querySelector('article.user .text').textContent") == (
        "你好<img src=x onerror=alert(1)>"
    )
    assert browser.evaluate("document.images.length") == 0
    assert " tokens in " in browser.evaluate("document.querySelector('.note').textContent")

    # At 400 pixels nothing is wider than the window.
    browser.resize(400, 700)
    assert browser.evaluate("document.scrollingElement.scrollWidth") <= 400
    assert browser.evaluate("document.getElementById('scroll').scrollWidth") <= 400

    assert not browser.complaints()
    assert all(address.startswith(served.url) for address in browser.asked())


@pytest.mark.full
def test_an_answer_can_be_stopped(browser: Browser, served: Served) -> None:
    browser.open(served.url)
    browser.wait_for("!document.getElementById('model').disabled")
    browser.type("Hello")
    browser.press_enter()
    browser.evaluate("document.getElementById('stop').click()")
    browser.wait_for("document.querySelector('article.assistant .note')")
    assert browser.evaluate("document.querySelector('.note').textContent").endswith("stopped")
    assert browser.evaluate("document.getElementById('stop').hidden") is True
    assert served.becomes_idle()


@pytest.mark.full
def test_the_key_is_asked_for_and_kept_in_the_tab(browser: Browser, tmp_path: Path) -> None:
    with serve_runs(make_runs(tmp_path, "one"), api_key="s3cret") as server:
        browser.open(server.url)
        browser.wait_for("!document.getElementById('settings').hidden")
        assert "asks for its API key" in browser.evaluate(
            "document.getElementById('state').textContent"
        )
        browser.call("Input.insertText", text="s3cret")
        browser.press_enter()
        browser.wait_for("!document.getElementById('model').disabled")
        assert browser.evaluate("Object.values(sessionStorage)") == ["s3cret"]
        assert browser.evaluate("localStorage.length") == 0
        assert browser.evaluate("document.cookie") == ""
        browser.type("Hello")
        browser.press_enter()
        browser.wait_for("document.querySelector('article.assistant .note')")
        assert " tokens in " in browser.evaluate("document.querySelector('.note').textContent")
