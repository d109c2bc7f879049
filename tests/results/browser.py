"""A real browser for tests of pages: Chromium shows each page in frames of several widths, and a script of the test's
own, in the page around them, looks at what became of it."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
NO_BROWSER = f"no browser: none of {', '.join(NAMES)} is on the path"
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--proxy-server=127.0.0.1:9",  # what would leave all the same goes nowhere
)
WIDTHS = (360, 1200)

# Run in the outer page, whose security policy is not the tested page's.
MEASURE = """
async function measured(frame) {
  const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
  const closed = root.scrollWidth;
  for (const part of page.querySelectorAll('details')) part.open = true;
  const images = [...page.images];
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  const boxed = element => element.closest('.scroll, pre, thead');
  const wide = [...page.body.querySelectorAll('*')].filter(element => {
    const box = element.getBoundingClientRect();
    return !boxed(element) && box.width && (box.right > view.innerWidth + 0.5 || box.left < -0.5);
  });
  return {
    width: view.innerWidth,
    scroll: [closed, root.scrollWidth],
    wide: wide.map(element => `${element.tagName} ${element.className.baseVal ?? element.className}`).slice(0, 9),
    boxes: [...page.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth).length,
    images: images.map(image => [image.naturalWidth, image.clientWidth]),
    requests: view.performance.getEntriesByType('resource').map(entry => entry.name),
    ground: view.getComputedStyle(page.body).backgroundColor,
    text: page.body.innerText,
    small: [...page.querySelectorAll('p, td, th, li, dd, dt, span, small, text')]
      .map(element => parseFloat(view.getComputedStyle(element).fontSize)).reduce((a, b) => Math.min(a, b), 99),
    bars: [...page.querySelectorAll('svg rect')].map(bar => bar.getBoundingClientRect().width /
      bar.closest('svg').getBoundingClientRect().width),
    ran: view.ran === true,
  };
}
addEventListener('load', async () => {
  const found = [];
  for (const frame of document.querySelectorAll('iframe')) found.push(await measured(frame));
  const shown = document.createElement('pre');
  shown.id = 'found';
  shown.textContent = JSON.stringify(found);
  document.body.append(shown);
});
"""


@dataclass(frozen=True)
class Browser:
    """Shows pages; its profile and files lie in a folder of the test."""

    folder: Path

    def run(self, path: Path, *options: str) -> str:
        assert CHROMIUM is not None
        command = [CHROMIUM, *OPTIONS, f"--user-data-dir={self.folder / 'profile'}", *options, path.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout

    def measure(self, text: str, *options: str) -> list[dict[str, Any]]:
        """What became of a page, in each of `WIDTHS`."""
        return self.measure_all([text], *options)[0]

    def measure_all(self, texts: Sequence[str], *options: str) -> list[list[dict[str, Any]]]:
        """The same of several pages, shown in one."""
        frames = "".join(
            f'<iframe srcdoc="{html.escape(text)}" width={w} height=800></iframe>' for text in texts for w in WIDTHS
        )
        path = self.folder / "frames.html"
        path.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}<script>{MEASURE}</script>")
        shown = self.run(path, "--virtual-time-budget=20000", "--dump-dom", *options)
        found = re.search(r'<pre id="found">(.*?)</pre>', shown, flags=re.DOTALL)
        assert found is not None, "the measuring script did not end"
        made: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
        assert [frame["width"] for frame in made] == list(WIDTHS) * len(texts)
        return [made[place : place + len(WIDTHS)] for place in range(0, len(made), len(WIDTHS))]

    def screenshot(self, path: Path, *options: str) -> np.ndarray:
        picture = self.folder / "shot.png"
        self.run(path, f"--screenshot={picture}", "--window-size=800,1000", *options)
        with Image.open(picture) as shown:
            return np.asarray(shown.convert("RGB")).copy()

    def complaints(self, path: Path, *options: str) -> list[str]:
        """What the browser's console says of a page that is opened by itself."""
        assert CHROMIUM is not None
        command = [CHROMIUM, *OPTIONS, f"--user-data-dir={self.folder / 'profile'}", "--enable-logging=stderr"]
        done = subprocess.run(
            [*command, "--dump-dom", *options, path.as_uri()], capture_output=True, text=True, timeout=240, check=True
        )
        assert "</html>" in done.stdout
        return [line for line in done.stderr.splitlines() if "CONSOLE" in line]
