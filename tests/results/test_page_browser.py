"""Pages in a real browser: nothing wider than a phone, every picture decodes, nothing is asked of anybody.

Chromium shows each page in frames of several widths; a script of the test's own, in the page around them, looks at what
became of it. Without Chromium on the machine the tests are skipped.
"""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mi_at.results import page, page_html
from mi_at.results.examples import write_examples
from mi_at.results.records import write_record
from tests.results import pages
from tests.results.pages import MEASURED

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no browser: none of {', '.join(NAMES)} is on the path")
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

    @cached_property
    def measured(self) -> dict[str, list[dict[str, Any]]]:
        return {name: self.measure(path.read_text()) for name, path in self.pages.items()}

    def measure(self, text: str, *options: str) -> list[dict[str, Any]]:
        frames = "".join(f'<iframe srcdoc="{html.escape(text)}" width={w} height=800></iframe>' for w in WIDTHS)
        path = self.folder / "frames.html"
        path.write_text(f"<!doctype html><meta charset=utf-8><body>{frames}<script>{MEASURE}</script>")
        shown = self.run(path, "--virtual-time-budget=20000", "--dump-dom", *options)
        found = re.search(r'<pre id="found">(.*?)</pre>', shown, flags=re.DOTALL)
        assert found is not None, "the measuring script did not end"
        made: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
        assert [frame["width"] for frame in made] == list(WIDTHS)
        return made

    def screenshot(self, path: Path, *options: str) -> np.ndarray:
        picture = self.folder / "shot.png"
        self.run(path, f"--screenshot={picture}", "--window-size=800,1000", *options)
        with Image.open(picture) as shown:
            return np.asarray(shown.convert("RGB")).copy()

    @cached_property
    def pages(self) -> dict[str, Path]:
        """An evaluation with everything in it, its comparison with others, and pages of old records."""
        run = self.folder / "run"
        result = pages.evaluation(channels=3)
        record = pages.record(result, audit=pages.AUDIT)
        write_record(run / "record.json", pages.record(result), result)
        write_examples(run / "examples.npz", pages.examples(result, channels=3))
        head_to_head = [path for path in MEASURED if "head_to_head" in str(path)]
        outcomes, known = page.beside(run / "record.json")
        long = pages.record(result, names={**pages.NAMES, "defense": "a_method_with_a_very_long_name_" * 4})
        sources: dict[str, Any] = {
            "everything": [(record, outcomes, known)],
            "old": [head_to_head[-1]],
            "six": head_to_head,
            "unlike": [(record, outcomes, known), head_to_head[0], (long, None, None)],
        }
        return {name: page.write_page(self.folder / f"{name}.html", source) for name, source in sources.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return Browser(tmp_path_factory.mktemp("browser"))


@pytest.mark.parametrize("name", ["everything", "old", "six", "unlike"])
def test_a_page_fits_a_phone_and_asks_nothing(name: str, browser: Browser) -> None:
    text = browser.pages[name].read_text()
    for frame in browser.measured[name]:
        assert frame["scroll"] == [frame["width"]] * 2, "it scrolls sideways"
        assert frame["wide"] == []
        assert frame["requests"] == []
        assert frame["small"] >= 12
        assert all(natural > 0 and 0 < shown < frame["width"] / 2 for natural, shown in frame["images"])
        assert len(frame["images"]) == text.count("<img ")
        assert all(0 <= share <= 1.001 for share in frame["bars"])
        if name == "everything":
            assert len(frame["images"]) == 18
            assert max(frame["bars"]) > 0.5
    phone = browser.measured[name][0]
    assert phone["boxes"] > 0, "wide tables scroll in boxes of their own"
    assert all(line in phone["text"] for line in ("n 60",) if name in ("everything", "unlike"))


def test_bars_are_as_long_as_their_numbers(browser: Browser) -> None:
    text = browser.pages["everything"].read_text()
    wanted = [float(share) / 100 for share in re.findall(r'<rect[^>]* width="([\d.]+)%"', text)]
    for frame in browser.measured["everything"]:
        assert frame["bars"] == pytest.approx(wanted, abs=0.003)


def test_what_is_wrong_would_be_seen(browser: Browser) -> None:
    """Without this, a measurement that sees nothing would pass every page."""
    good = browser.pages["old"].read_text()
    policy = html.escape(page_html.POLICY)
    assert policy in good
    loose = good.replace(policy, "")
    spoilt = loose.replace(
        "<main>",
        '<main><div style="width:1300px">wide</div><img alt="" src="data:image/png;base64,AAAA">'
        '<img alt="" src="http://example.invalid/a.png"><script>ran=true</script>',
    )
    for frame in browser.measure(spoilt):
        assert frame["scroll"] != [frame["width"]] * 2
        assert frame["wide"]
        assert [0, 0] in [[natural, 0] for natural, _ in frame["images"]]
        assert frame["requests"] == ["http://example.invalid/a.png"]
        assert frame["ran"]
    # The page's own policy forbids what might have slipped in all the same.
    for frame in browser.measure(spoilt.replace('content=""', f'content="{policy}"')):
        assert not frame["ran"]


def test_both_themes(browser: Browser) -> None:
    text = browser.pages["everything"].read_text()
    for scheme, colours in ((1, page_html.LIGHT), (0, page_html.DARK)):
        frame = browser.measure(text, f"--blink-settings=preferredColorScheme={scheme}")[0]
        ground = colours["ground"]
        rgb = ", ".join(str(int(ground[place : place + 2], 16)) for place in (1, 3, 5))
        assert frame["ground"] == f"rgb({rgb})"


def test_a_page_alone_in_a_window_shows_bars_of_its_colours(browser: Browser) -> None:
    shot = browser.screenshot(browser.pages["six"], "--blink-settings=preferredColorScheme=1")
    colours = {tuple(pixel) for pixel in shot[::2, ::2].reshape(-1, 3).tolist()}
    for name in ("ground", "attack"):
        value = page_html.LIGHT[name]
        assert tuple(int(value[place : place + 2], 16) for place in (1, 3, 5)) in colours, name
