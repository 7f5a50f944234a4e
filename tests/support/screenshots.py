"""Renew the pictures of pages in docs/images, with Chromium, from pages that you have made.

    python -m tests.support.screenshots run=runs/distill/student/report.html sweep=sweeps/search/sweep.html
    python -m tests.support.screenshots playground=runs/pretrain/teacher,runs/distill/student

Names: those of PICTURES. `playground` takes a checkpoint and its draft model, whose server it starts.
"""

import base64
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.chromium import Browser

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "images"
LARGEST = 60_000  # bytes
QUALITIES = (80, 70, 60, 50, 40, 30, 20, 10)


@dataclass(frozen=True)
class Picture:
    """Part of a page: its width, the most of its height, and the colour scheme; `scale` of its pixels."""

    width: int = 1160
    height: int = 1100
    scheme: str = "light"
    scale: float = 0.9


PICTURES = {
    "demo": Picture(1400, 1475, scale=0.8),
    "run": Picture(),
    "phone": Picture(390, 1100, "dark", 1.0),
    "comparison": Picture(height=1500, scale=0.75),
    "sweep": Picture(height=2300, scale=0.7),
    "study": Picture(scheme="dark"),
    "scores": Picture(height=900),
    "inspection": Picture(1160, 1000),
    "playground": Picture(1400, 1000, scale=0.8),
}


def take(browser: Browser, picture: Picture) -> bytes:
    """Return the picture of the open page as WebP of at most `LARGEST` bytes."""
    height = min(picture.height, browser.value("document.documentElement.scrollHeight"))
    clip = {"x": 0, "y": 0, "width": picture.width, "height": height, "scale": picture.scale}
    for quality in QUALITIES:
        options = {"format": "webp", "quality": quality, "captureBeyondViewport": True, "clip": clip}
        image = base64.b64decode(browser.call("Page.captureScreenshot", options)["data"])
        if len(image) <= LARGEST:
            return image
    raise ValueError(
        f"The picture has {len(image):,} bytes even at quality {QUALITIES[-1]}: lower its height or scale."
    )


@contextmanager
def opened(browser: Browser, name: str, source: str) -> Iterator[None]:
    """Open a page; the playground with the text of its first example."""
    if name != "playground":
        browser.open(Path(source).absolute().as_uri())
        yield
        return
    model, _, draft = source.partition(",")
    words = [f"checkpoint={model}", f"draft={draft}", "serve=true", "port=0", "max_new_tokens=100"]
    server = subprocess.Popen([sys.executable, "generate.py", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        browser.open(server.stdout.readline().split()[1])
        browser.wait("document.querySelector('#examples button') !== null")
        browser.click("#examples button")
        browser.click("#write")
        browser.wait("document.querySelector('#status').innerText.startsWith('Done')")
        browser.point("#panel-model .token:nth-child(4)")
        yield
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Write the pictures that are named on the command line."""
    browser = Browser(Path(tempfile.mkdtemp()))
    try:
        for name, _, source in (word.partition("=") for word in sys.argv[1:]):
            picture = PICTURES[name]
            browser.resize(picture.width, picture.scheme)
            with opened(browser, name, source):
                image = take(browser, picture)
            (FOLDER / f"{name}.webp").write_bytes(image)
            print(f"docs/images/{name}.webp: {len(image):,} bytes")
    finally:
        browser.close()


if __name__ == "__main__":
    main()
