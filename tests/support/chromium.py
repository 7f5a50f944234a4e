"""Headless Chromium for tests of pages, driven over its DevTools protocol."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OUT_OF_ROW = """[...document.querySelectorAll('.grid td')]
  .filter(one => one.offsetParent && getComputedStyle(one).display !== 'table-cell').map(one => one.textContent)"""
EMPTY_ROWS = """[...document.querySelectorAll('.grid tr')]
  .filter(one => one.offsetParent && one.offsetHeight && !one.closest('details:not([open])') && !one.innerText.trim())
  .map(one => one.outerHTML.slice(0, 80))"""
PATIENCE = 60.0  # seconds, on a busy machine
SMALLEST = 11  # pixels
SMALL_TEXTS = f"""[...document.querySelectorAll('body *')].filter(one => one.offsetParent
  && [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())
  && parseFloat(getComputedStyle(one).fontSize) < {SMALLEST}).map(one => one.outerHTML.slice(0, 80))"""
STACKED = """[...document.querySelectorAll('.number, .value, .tile b, td, .row > span:first-child')]
  .filter(one => one.offsetParent && one.textContent.length > 3)
  .filter(one => one.getBoundingClientRect().width < 5 * Math.min(one.textContent.length, 12))
  .map(one => one.textContent)"""


class Browser:
    """One tab, which can reach 127.0.0.1 alone."""

    def __init__(self, folder: Path, width: int = 1400, height: int = 1000) -> None:
        assert PROGRAM is not None
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            f"--window-size={width},{height}",
            f"--user-data-dir={folder}",
            "--remote-debugging-port=0",
        ]
        self._process = subprocess.Popen(
            [PROGRAM, *options, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._loop, self._number = asyncio.new_event_loop(), 0
        self.events: list[dict[str, Any]] = []  # events of the protocol, among them errors of the page
        try:
            self._loop.run_until_complete(self._connect(self._port(folder / "DevToolsActivePort")))
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self._kill()
            raise

    @staticmethod
    def _port(place: Path) -> str:
        """Return the port of the browser, from the file in its folder."""
        end = time.monotonic() + PATIENCE
        while not (place.is_file() and place.read_text().count("\n")):
            assert time.monotonic() < end, "chromium does not start"
            time.sleep(0.05)
        return place.read_text().splitlines()[0]

    async def _connect(self, port: str) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json") as answer:
            tab = next(tab for tab in await answer.json() if tab["type"] == "page")
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)

    def call(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send one command of the protocol and return its result."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, parameters or {}), PATIENCE))

    async def _call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_str(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads((await self._socket.receive()).data)
            if message.get("id") == self._number:
                assert "error" not in message, message["error"]
                return message["result"]
            self.events.append(message)

    def value(self, script: str) -> Any:
        """Return the value of a script in the page."""
        result = self.call("Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str) -> Any:
        """Return the first value of the script that is true."""
        end = time.monotonic() + PATIENCE
        while not (value := self.value(script)):
            assert time.monotonic() < end, f"{script} never came true:\n{self.value('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def resize(self, width: int, scheme: str = "light") -> None:
        """Show pages as on a device of this width; a narrow one is a phone."""
        device = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", device)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", {"features": features})

    def open(self, address: str) -> None:
        self.call("Page.navigate", {"url": address})
        self.wait("document.readyState === 'complete'")

    def click(self, selector: str) -> None:
        """Click on an element with the mouse."""
        place = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return {x: r.x + r.width / 2, y: r.y + r.height / 2}; })()"
        )
        self._mouse("mouseMoved", place)
        for kind in ("mousePressed", "mouseReleased"):
            self._mouse(kind, {**place, "button": "left", "clickCount": 1})

    def point(self, selector: str) -> None:
        """Move the mouse onto an element."""
        place = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'nearest'}); const r = e.getClientRects()[0];"
            "return {x: r.x + r.width / 2, y: r.y + r.height / 2}; })()"
        )
        self._mouse("mouseMoved", place)

    def _mouse(self, kind: str, place: dict[str, Any]) -> None:
        self.call("Input.dispatchMouseEvent", {"type": kind, **place})

    def type(self, selector: str, text: str) -> None:
        """Replace the text of a field."""
        self.value(f"document.querySelector({json.dumps(selector)}).select()")
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", {"text": text})

    def close(self) -> None:
        self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._kill()

    def _kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def show_file(browser: Browser, file: Path, width: int, scheme: str = "light") -> None:
    browser.resize(width, scheme)
    browser.events.clear()
    browser.open(file.as_uri())


def faults(browser: Browser, width: int) -> dict[str, Any]:
    """Return what is wrong with the shown page; empty if nothing is."""
    scripts = "document.querySelectorAll('figure.plot').length - document.querySelectorAll('figure.plot canvas').length"
    found = {
        "scrolls by": browser.value(f"Math.max(document.documentElement.scrollWidth - {width}, 0)"),
        "small": browser.value(SMALL_TEXTS),
        "stacked letters": browser.value(STACKED),
        "empty rows": browser.value(EMPTY_ROWS) if width < 800 else [],
        "charts that are not drawn": browser.value(scripts),
        "cells out of their row": browser.value(OUT_OF_ROW) if width > 800 else [],
    }
    methods = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening")
    found["errors"] = [event for event in browser.events if event.get("method") in methods]
    return {name: value for name, value in found.items() if value}
