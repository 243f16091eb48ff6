"""Headless Chromium over its debugging pipe: a page at a width and in a colour scheme, a real mouse, the console, every request.

with Browser(folder) as browser:
    browser.open(page, width=390, dark=True)
    browser.value("document.title")
    browser.move(*browser.middle("svg use"))
    browser.requested, browser.said
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

COMMAND = [
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]


class Browser:
    """One browser with one page at a time.

    Attributes:
        requested: the addresses that the page asked for, its own among them.
        said: what the console has: messages, errors, and what the browser refused.
    """

    def __init__(self, folder: Path) -> None:
        # It reads commands from descriptor 3 and answers on 4. Both ends lie above them, so that neither is overwritten.
        theirs, self._to = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())
        self._from, answers = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())

        def wire() -> None:
            os.dup2(theirs, 3)
            os.dup2(answers, 4)

        self._process = subprocess.Popen(
            [*COMMAND, f"--user-data-dir={folder / 'chromium'}", "about:blank"],
            preexec_fn=wire,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(answers)
        self._rest, self._count, self._session = b"", 0, None
        self._events: list[dict[str, Any]] = []
        pages = [t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.ask("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait(30)
        os.close(self._to)
        os.close(self._from)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol; its result."""
        self._count += 1
        command = {"id": self._count, "method": method, "params": parameters}
        os.write(
            self._to, json.dumps(command | ({"sessionId": self._session} if self._session else {})).encode() + b"\0"
        )
        while True:
            message = self._message()
            if message.get("id") == self._count:
                assert "error" not in message, message["error"]
                return message["result"]
            self._events.append(message)

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file and wait until it is loaded."""
        self._events.clear()
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=page.as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self._events):
            self._events.append(self._message())

    @property
    def requested(self) -> list[str]:
        return [e["params"]["request"]["url"] for e in self._events if e["method"] == "Network.requestWillBeSent"]

    @property
    def said(self) -> list[dict[str, Any]]:
        spoken = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [e["params"] for e in self._events if e["method"] in spoken]

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, as JSON; a promise is waited for."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def middle(self, selector: str, which: int = 0) -> tuple[float, float]:
        """The middle of an element in the window, into which it is scrolled."""
        at = self.value(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect(); "
            f"return [r.x + r.width / 2, r.y + r.height / 2]; }})(document.querySelectorAll({json.dumps(selector)})[{which}])"
        )
        return at[0], at[1]

    def move(self, x: float, y: float) -> None:
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press and release Tab or Enter."""
        code, text = {"Tab": (9, ""), "Enter": (13, "\r")}[key]
        for kind in ("keyDown", "keyUp"):
            self.ask(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **{"text": text} if text else {},
            )

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            got = os.read(self._from, 1 << 20)
            assert got, "Chromium ended"
            self._rest += got
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)
