"""A headless Chromium over its debugging pipe (the DevTools protocol), to test and photograph pages.

`python tests/decode/explain/browser.py report.html#12.3 shot.png --width 390 --dark` takes a picture.
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 120.0


def chromium() -> str | None:
    """The program, or None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """A context: one page. `problems` lists errors, warnings and every request that leaves the file."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.number = 0

    def __enter__(self) -> "Browser":
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self.to = os.pipe()
        self.back, to_write = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        program = [chromium(), *flags, f"--user-data-dir={self.profile.name}"]
        # Chromium reads commands from descriptor 3 and answers on 4.
        argv = ["bash", "-c", f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}', *program]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(argv, pass_fds=(to_read, to_write), **quiet)
        os.close(to_read)
        os.close(to_write)
        self.stream = os.fdopen(self.back, "rb")
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        self.stream.close()
        self.profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; what the page reports in between is looked at."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._look_at(answer)

    def _next(self) -> dict[str, Any]:
        found = bytearray()
        while (byte := self.stream.read(1)) != b"\0":
            assert byte, "the browser ended"
            found += byte
        return json.loads(found)

    def _look_at(self, event: dict[str, Any]) -> None:
        method, what = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(what["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning"):
            self.problems.append(json.dumps(what["args"]))
        elif method == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            self.problems.append(what["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = what["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                self.problems.append(f"a request: {url}")

    def open(self, address: str, width: int = 1200, height: int = 800, scale: float = 1, dark: bool = False) -> None:
        """Load a file, with or without `#…` after its name, in a window of this size in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        path, _, fragment = address.partition("#")
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=Path(path).resolve().as_uri() + (f"#{fragment}" if fragment else ""))
        self.wait("location.protocol === 'file:' && document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression, by way of JSON."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        until = time.monotonic() + SECONDS
        while not self.value(condition):
            assert time.monotonic() < until, f"never true: {condition}"
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        """Keys by name (`Tab`, `ArrowRight`) or single characters."""
        codes = {"Tab": 9, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38}
        codes |= {"ArrowRight": 39, "ArrowDown": 40, "/": 191}
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            code = codes.get(key, ord(key[0].upper()))
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def picture(self) -> bytes:
        """PNG of the window."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


def main() -> None:
    parser = argparse.ArgumentParser(description="A picture of a page.")
    parser.add_argument("page")
    parser.add_argument("output")
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--scale", type=float, default=1)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--script", default="0", help="JavaScript to run before the picture is taken")
    arguments = parser.parse_args()
    with Browser() as browser:
        browser.open(arguments.page, arguments.width, arguments.height, arguments.scale, arguments.dark)
        browser.value(arguments.script)
        Path(arguments.output).write_bytes(browser.picture())
        print(browser.value("[innerWidth, document.documentElement.scrollWidth]"), browser.problems)


if __name__ == "__main__":
    main()
