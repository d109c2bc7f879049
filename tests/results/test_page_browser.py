"""Pages in a real browser: nothing wider than a phone, every picture decodes, nothing is asked of anybody.

Without Chromium on the machine the tests are skipped.
"""

import html
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from mi_at.results import page, page_html
from mi_at.results.examples import write_examples
from mi_at.results.records import write_record
from tests.results import pages
from tests.results.browser import CHROMIUM, NO_BROWSER, Browser
from tests.results.pages import MEASURED

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)


@dataclass(frozen=True)
class Pages(Browser):
    """A browser, and the pages that it shows here."""

    @cached_property
    def measured(self) -> dict[str, list[dict[str, Any]]]:
        return {name: self.measure(path.read_text()) for name, path in self.pages.items()}

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
def browser(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    return Pages(tmp_path_factory.mktemp("browser"))


@pytest.mark.parametrize("name", ["everything", "old", "six", "unlike"])
def test_a_page_fits_a_phone_and_asks_nothing(name: str, browser: Pages) -> None:
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


def test_bars_are_as_long_as_their_numbers(browser: Pages) -> None:
    text = browser.pages["everything"].read_text()
    wanted = [float(share) / 100 for share in re.findall(r'<rect[^>]* width="([\d.]+)%"', text)]
    for frame in browser.measured["everything"]:
        assert frame["bars"] == pytest.approx(wanted, abs=0.003)


def test_what_is_wrong_would_be_seen(browser: Pages) -> None:
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


def test_both_themes(browser: Pages) -> None:
    text = browser.pages["everything"].read_text()
    for scheme, colours in ((1, page_html.LIGHT), (0, page_html.DARK)):
        frame = browser.measure(text, f"--blink-settings=preferredColorScheme={scheme}")[0]
        ground = colours["ground"]
        rgb = ", ".join(str(int(ground[place : place + 2], 16)) for place in (1, 3, 5))
        assert frame["ground"] == f"rgb({rgb})"


def test_a_page_alone_in_a_window_shows_bars_of_its_colours(browser: Pages) -> None:
    shot = browser.screenshot(browser.pages["six"], "--blink-settings=preferredColorScheme=1")
    colours = {tuple(pixel) for pixel in shot[::2, ::2].reshape(-1, 3).tolist()}
    for name in ("ground", "attack"):
        value = page_html.LIGHT[name]
        assert tuple(int(value[place : place + 2], 16) for place in (1, 3, 5)) in colours, name
