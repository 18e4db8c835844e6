"""A page in headless Chromium, over its debugging pipe: no driver, no other package. From the root of the clone:

python -m tests.browser.chromium runs/sample/DeMo_SDTPS/report.html --out /tmp/report --width 1280 --width 390
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LOOK = """({
  width: innerWidth, scrollWidth: document.documentElement.scrollWidth,
  pictures: document.images.length, broken: [...document.images].filter(i => !i.complete || !i.naturalWidth).length,
  svgs: document.querySelectorAll('svg').length,
  wide: [...document.querySelectorAll('body *')].filter(
    e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, .entries, .triple, svg, .view")
  ).map(e => e.tagName + '.' + e.className).slice(0, 5),
})"""


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """Context manager: one browser with one empty page. `messages` holds what went wrong on it, `requests` what it
    asked the network for."""

    def __init__(self, program: str):
        self.program = program
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.events: list[dict[str, Any]] = []
        self._count = 0

    def __enter__(self) -> "Chromium":
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read_here, self._write = os.pipe()
        self._read, write_here = os.pipe()

        def connect() -> None:  # the browser reads commands from descriptor 3 and answers on 4
            high = [os.dup(fd) for fd in (read_here, write_here)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        flags = (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
        )
        words = [self.program, *flags, f"--user-data-dir={self._folder.name}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(words, preexec_fn=connect, close_fds=False, **quiet)
        os.close(read_here)
        os.close(write_here)
        self._buffer = b""
        self._session: str | None = None
        page = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *exception: object) -> None:
        self._session = None
        self.send("Browser.close")
        os.close(self._write)
        os.close(self._read)
        self._process.wait(timeout=30)
        self._folder.cleanup()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; what comes in between is kept as events."""
        self._count += 1
        command: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._write, json.dumps(command).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == command["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, page: Path, width: int, dark: bool = False) -> dict[str, Any]:
        """Loads a file into a viewport and looks at it, see LOOK."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.send("Emulation.setScrollbarsHidden", hidden=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.send("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self._next()
        return self.run(LOOK)

    def run(self, script: str) -> Any:
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def screenshot(self, height: int = 0, top: int = 0) -> bytes:
        """PNG of the page from `top` on, whole or `height` pixels of it."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": top, "width": size["width"], "height": height or size["height"] - top, "scale": 1}
        shot = self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 16)
            if not part:
                raise RuntimeError("the browser went away")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        if "id" not in message:
            self.events.append(message)
            self._note(message["method"], message.get("params", {}))
        return message

    def _note(self, method: str, of: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.messages.append(of["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and of["type"] in ("error", "warning", "assert"):
            self.messages.append(str(of["args"]))
        elif method == "Log.entryAdded":
            self.messages.append(of["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not of["request"]["url"].startswith("data:"):
            self.requests.append(of["request"]["url"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", required=True, help="beginning of the pictures' names")
    parser.add_argument("--width", type=int, action="append", required=True)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--click", help="selector of an element to click first")
    parser.add_argument("--top", type=int, default=0)
    parser.add_argument("--height", type=int, default=0)
    args = parser.parse_args()
    program = find_chromium()
    if program is None:
        raise SystemExit(f"none of {', '.join(NAMES)} is installed")
    with Chromium(program) as browser:
        for width in args.width:
            print(json.dumps(browser.open(args.page, width, args.dark)))
            if args.click:
                browser.run(f"document.querySelector({args.click!r}).click()")
            Path(f"{args.out}_{width}.png").write_bytes(browser.screenshot(args.height, args.top))
        print("messages:", browser.messages, "requests:", len(browser.requests))


if __name__ == "__main__":
    main()
