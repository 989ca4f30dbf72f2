"""Pages in a real Chromium, driven by chromedriver: https://www.w3.org/TR/webdriver2/."""

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from tests.packages import install

NEEDED = {"chromium": "chromium", "chromedriver": "chromium-driver"}  # programs by Debian package
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
    "--hide-scrollbars",
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # what WebDriver calls an element in JSON
KEYS = {"Right": "\ue014", "Left": "\ue012", "Home": "\ue011", "End": "\ue010", "Tab": "\ue004"}
PATIENCE = 240  # seconds
AXE = Path(__file__).parent / "axe" / "axe.min.js"


class Browser:
    """A Chromium with a fresh profile, whose console and requests are heard from the start."""

    def __enter__(self) -> "Browser":
        install(NEEDED)
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True
        )
        assert self._driver.stdout is not None
        port = next(
            found[1]
            for line in self._driver.stdout
            if (found := re.search(r"started successfully on port (\d+)", line))
        )
        self._address = f"http://127.0.0.1:{port}/session"
        options = {
            "args": [*FLAGS, f"--user-data-dir={self._profile.name}"],
            "binary": shutil.which("chromium"),
        }
        logs = {"browser": "ALL", "performance": "ALL"}
        asked = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": logs}}
        self._address += "/" + self._ask("POST", "", {"capabilities": asked})["sessionId"]
        self._ask("POST", "/url", {"url": "about:blank"})  # a new tab asks for much of its own
        return self

    def __exit__(self, *_: object) -> None:
        self._ask("DELETE", "")
        self._driver.kill()
        self._driver.wait()
        self._profile.cleanup()

    def _ask(self, method: str, path: str, content: dict[str, Any] | None = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        with urlopen(Request(self._address + path, data, method=method), timeout=120) as answer:
            return json.load(answer)["value"]

    def devtools(self, command: str, **parameters: object) -> Any:
        """A command of the DevTools protocol."""
        given = {"cmd": command, "params": parameters}
        return self._ask("POST", "/goog/cdp/execute", given)

    def open(self, path: Path, width: int, scheme: str) -> None:
        """A page as a screen of this width, light or dark, shows it."""
        self.visit(path.resolve().as_uri(), width, 900, scheme=scheme)

    def visit(self, address: str, width: int, height: int, scheme: str = "light") -> None:
        """An address on a screen of this size."""
        for log in ("browser", "performance"):
            self._ask("POST", "/se/log", {"type": log})  # what is read is forgotten
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        preference = {"name": "prefers-color-scheme", "value": scheme}
        self.devtools("Emulation.setEmulatedMedia", features=[preference])
        self._ask("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: object) -> Any:
        """What a function with this body returns; a promise is waited for."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": arguments})

    def wait(self, script: str) -> None:
        """Until what a function with this body returns is true; an AssertionError after a while."""
        end = time.monotonic() + PATIENCE
        while not self.run(script):
            assert time.monotonic() < end, f"not in {PATIENCE} seconds: {script}"
            time.sleep(0.05)

    def press(self, selector: str, *keys: str) -> None:
        """Press keys, by name, on the first element of a selector."""
        by = {"using": "css selector", "value": selector}
        element = self._ask("POST", "/element", by)[ELEMENT]
        text = "".join(KEYS[key] for key in keys)
        self._ask("POST", f"/element/{element}/value", {"text": text})

    def console(self) -> list[str]:
        """What the page has written to the console since it was opened, errors included."""
        lines = self._ask("POST", "/se/log", {"type": "browser"})
        return [f"{line['level']}: {line['message']}" for line in lines]

    def requested(self) -> list[str]:
        """The addresses that were asked for since then, but for what the page itself holds."""
        events = [
            json.loads(line["message"])["message"]
            for line in self._ask("POST", "/se/log", {"type": "performance"})
        ]
        urls = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]

    def overflow(self) -> int:
        """By how many pixels the page is wider than its screen."""
        return int(
            self.run(
                "const root = document.documentElement; return root.scrollWidth - root.clientWidth"
            )
        )

    def violations(self) -> list[str]:
        """What axe-core finds wrong: https://github.com/dequelabs/axe-core."""
        self.run(AXE.read_text(encoding="utf-8"))
        found = self.run("return axe.run(document)")["violations"]
        return [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]]

    def screenshot(self, path: Path) -> None:
        """The page at its whole length, as a PNG file."""
        data = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
