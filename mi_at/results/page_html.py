"""HTML that cannot be broken into: tags made by functions that escape what they are given, and the pages' one style.

A page asks nothing of anybody: no script, no font, no picture from elsewhere. Its own security policy says so too.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

VOID = frozenset({"meta", "img", "br", "link"})
SHAPES = frozenset({"line", "rect", "circle"})  # of SVG, which know no void elements
GENERATOR = '<meta name="generator" content="mi_at">'  # by which a page is known to be one of ours
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

# Series: Okabe and Ito's colours (2008), which colour-blind readers tell apart, darkened or lightened until they have
# a contrast of 3 with the ground (WCAG 2.1, 1.4.11); what is read as text has 4.5 (1.4.3).
LIGHT = {
    "ground": "#ffffff",
    "raised": "#f4f6f8",
    "line": "#d5dae1",
    "text": "#1b1f24",
    "muted": "#545d68",
    "link": "#0a5c96",
    "clean": "#6b7683",
    "attack": "#0072b2",
    "worst": "#b84a00",
    "series0": "#0072b2",
    "series1": "#c25700",
    "series2": "#007f5c",
    "series3": "#a2487b",
    "series4": "#1b1f24",
    "series5": "#7a6a00",
    "fail": "#a4161a",
    "warn": "#7d4a00",
    "info": "#0a5c96",
    "pass": "#176639",
    "none": "#545d68",
}
DARK = {
    "ground": "#14171b",
    "raised": "#1e2329",
    "line": "#3a424c",
    "text": "#e8ebee",
    "muted": "#a7b0ba",
    "link": "#7cc3f2",
    "clean": "#929daa",
    "attack": "#56b4e9",
    "worst": "#f28e4b",
    "series0": "#56b4e9",
    "series1": "#e69f00",
    "series2": "#2bc49a",
    "series3": "#e094bd",
    "series4": "#e8ebee",
    "series5": "#f0e442",
    "fail": "#ff9d96",
    "warn": "#f2c063",
    "info": "#7cc3f2",
    "pass": "#6fd596",
    "none": "#a7b0ba",
}
SERIES = 6
HEAT = {"light": "0 114 178", "dark": "86 180 233"}  # of the confusion table, laid thinly over the ground


class Html(str):
    """Markup that is safe as it is; every other string is text."""

    __slots__ = ()


Child = str | int | None


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """An element.

    Args:
        name: of the element.
        children: `Html` as it is, other strings and numbers as text, None not at all.
        attributes: `class_` is class, `aria_label` is aria-label; None and False leave one out, True has no value.

    Returns:
        The markup.

    Raises:
        ValueError: a void element with children.

    Example:
        >>> tag("p", "a < b", tag("b", "c"), class_='"x"')
        '<p class="&quot;x&quot;">a &lt; b<b>c</b></p>'
    """
    shown = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID or name in SHAPES:
        if children:
            raise ValueError(f"<{name}> has no content, found {children!r}")
        return Html(f"<{name}{shown}{'/' * (name in SHAPES)}>")
    return Html(f"<{name}{shown}>{join(children)}</{name}>")


def join(parts: Iterable[Child], between: str = "") -> Html:
    """Several pieces in a row, text escaped.

    Example:
        >>> join(["<", tag("i", 1)], ", ")
        '&lt;, <i>1</i>'
    """
    texts = (part if isinstance(part, Html) else html.escape(str(part)) for part in parts if part is not None)
    return Html(between.join(texts))


def table(
    caption: str,
    headings: Sequence[Child],
    rows: Iterable[Sequence[Child]],
    *,
    right: Iterable[int] = (),
    stacked: bool = False,
    wide: bool = False,
) -> Html:
    """A table in a box of its own that scrolls sideways where it is too wide; the first cell of a row is its heading.

    Args:
        caption: what it shows.
        headings: of the columns.
        rows: cells.
        right: columns of numbers.
        stacked: on a narrow screen a row becomes a block, each cell under its heading: for sentences.
        wide: cells are not wrapped.

    Returns:
        The markup.

    Example:
        >>> '<th scope="row">a</th>' in table("t", ["x", "y"], [["a", 1]])
        True
    """
    numbers = set(right)
    names = [str(heading) for heading in headings]

    def cell(place: int, content: Child) -> Html:
        class_ = "number" if place in numbers else None
        # Roles again: a table shown as blocks is none any more to some readers.
        roles = {"role": "rowheader" if place == 0 else "cell", "data_label": names[place]} if stacked else {}
        if place == 0:
            return tag("th", content, scope="row", class_=class_, **roles)
        return tag("td", content, class_=class_, **roles)

    role = (lambda name: {"role": name}) if stacked else (lambda name: {})
    head = (
        tag("th", heading, scope="col", class_="number" if place in numbers else None, **role("columnheader"))
        for place, heading in enumerate(headings)
    )
    body = (tag("tr", *(cell(place, part) for place, part in enumerate(row)), **role("row")) for row in rows)
    made = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", tag("tr", *head, **role("row")), **role("rowgroup")),
        tag("tbody", *body, **role("rowgroup")),
        class_=" ".join(filter(None, ["stacked" if stacked else "", "wide" if wide else ""])) or None,
        **role("table"),
    )
    # A box that scrolls must be reachable by keyboard.
    return tag("div", made, class_="scroll", tabindex=0, role="region", aria_label=caption)


def facts(pairs: Mapping[str, Child]) -> Html:
    """A list of names and values.

    Example:
        >>> facts({"seed": 0})
        '<dl class="facts"><div><dt>seed</dt><dd>0</dd></div></dl>'
    """
    return tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in pairs.items()), class_="facts")


def section(title: str, *children: Child) -> Html:
    """A part of a page with its heading and an address within it.

    Example:
        >>> section("Loss terms", "x")
        '<section id="loss-terms" aria-labelledby="loss-terms-h"><h2 id="loss-terms-h">Loss terms</h2>x</section>'
    """
    name = anchor(title)
    return tag("section", tag("h2", title, id=f"{name}-h"), *children, id=name, aria_labelledby=f"{name}-h")


def anchor(title: str) -> str:
    """A section's address.

    Example:
        >>> anchor("What was evaluated")
        'what-was-evaluated'
    """
    return "-".join("".join(letter if letter.isalnum() else " " for letter in title.lower()).split())


def document(title: str, lead: Html, sections: Mapping[str, Html], *, foot: Child = None, up: Child = None) -> str:
    """A whole page.

    Args:
        title: of the page.
        lead: what stands under it.
        sections: by title, each without its heading.
        foot: the last line.
        up: links to the pages above it; None for a page that stands alone.

    Returns:
        The file's text.
    """
    links = (tag("li", tag("a", name, href=f"#{anchor(name)}")) for name in sections)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content="mi_at"),  # `GENERATOR`
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(style())),
    )
    body = tag(
        "body",
        tag("nav", up, class_="up", aria_label="Where this page is") if up is not None else None,
        tag("header", tag("h1", title), lead),
        tag("nav", tag("ul", *links), aria_label="Parts of this page"),
        tag("main", *(section(name, content) for name, content in sections.items())),
        tag("footer", foot) if foot is not None else None,
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def style() -> str:
    """The style sheet: both themes, and what both share."""
    light, dark = (
        "".join(f"--{key}:{value};" for key, value in palette.items()) + f"--heat:{HEAT[name]};"
        for name, palette in (("light", LIGHT), ("dark", DARK))
    )
    return f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{_STYLE}"


_STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0 auto;padding:1.25rem 1rem 3rem;max-width:66rem;background:var(--ground);color:var(--text);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.25rem 0 .25rem;letter-spacing:-.01em}
h2{font-size:1.2rem;line-height:1.3;margin:2.75rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--line)}
h3{font-size:1rem;line-height:1.35;margin:1.75rem 0 .5rem}
p{margin:.5rem 0;max-width:46rem}
.sub,.note,figcaption,caption,small,footer{color:var(--muted)}
.note,figcaption,caption,small,footer{font-size:.85rem}
a{color:var(--link)}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
code,pre{font:.85rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
pre{margin:.5rem 0;padding:.75rem;background:var(--raised);border-radius:6px;overflow-x:auto;overflow-wrap:normal}
pre.command{white-space:pre-wrap;overflow-wrap:anywhere}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1rem;margin:1.25rem 0 0;padding:0;font-size:.9rem}
nav a{display:inline-block;padding:.15rem 0}
nav.up{font-size:.9rem;color:var(--muted)}
footer{margin-top:3rem;border-top:1px solid var(--line);padding-top:.75rem}
figure{margin:0 0 1rem}
figcaption{margin:.25rem 0 .5rem;max-width:46rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin:1.25rem 0 .5rem;
padding:0;list-style:none}
.tiles li{background:var(--raised);border-radius:8px;padding:.8rem 1rem;border-left:4px solid var(--line)}
.tiles .clean{border-left-color:var(--clean)}.tiles .worst{border-left-color:var(--worst)}
.tiles .attack{border-left-color:var(--attack)}
.tiles .fail{border-left-color:var(--fail)}.tiles .warn{border-left-color:var(--warn)}
.tiles .info{border-left-color:var(--info)}.tiles .pass{border-left-color:var(--pass)}
.tiles span{display:block}
.tiles .what{font-size:.9rem;color:var(--muted)}
.tiles .big{font-size:1.9rem;line-height:1.25;font-weight:650;font-variant-numeric:tabular-nums;letter-spacing:-.02em}
.tiles .big small{font-size:1rem;font-weight:400;letter-spacing:0}
.tiles .how{font-size:.85rem;font-variant-numeric:tabular-nums}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:.6rem 1.5rem;margin:.5rem 0}
.facts div{display:grid;grid-template-columns:6.5rem minmax(0,1fr);align-items:baseline}
.facts dt{font-size:.85rem;color:var(--muted)}
.facts dd{margin:0}
.scroll{position:relative;overflow-x:auto;margin:.75rem 0;max-width:100%;overflow-wrap:normal}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:0 0 .4rem;caption-side:top}
caption span{display:inline-block;position:sticky;left:0;max-width:min(46rem,calc(100vw - 2rem));white-space:normal}
th,td{text-align:left;vertical-align:top;padding:.35rem .9rem .35rem 0;border-bottom:1px solid var(--line)}
th:last-child,td:last-child{padding-right:.25rem}
thead th{font-weight:600;color:var(--muted);vertical-align:bottom;border-bottom-color:var(--muted)}
tbody th{font-weight:600}
td.number,th.number{text-align:right;white-space:nowrap}
thead th.number{white-space:normal;min-width:5rem}
.wide td,.wide th{white-space:nowrap}
.numbers td{text-align:right}
.numbers td span,.numbers td a,.numbers td small{display:block;white-space:nowrap}
.numbers th small{display:block;font-weight:400}
.numbers tbody th{min-width:8rem;max-width:14rem}
tr.group th{padding-top:1rem;color:var(--text)}
.printed{color:var(--muted)}
.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
table:not(.stacked) th:first-child{position:sticky;left:0;background:var(--ground)}
.stacked{width:100%}
.stacked td,.stacked th{overflow-wrap:break-word}
.bars{list-style:none;margin:.25rem 0 0;padding:0}
.bars li{display:grid;grid-template-columns:minmax(0,1fr) auto;column-gap:.75rem;padding:.35rem 0}
.bars .plot{grid-column:1/-1}
.bars .value{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.bars .value small{display:block;line-height:1.3}
.bars .name small{display:block;line-height:1.3}
.bars .axis{padding-top:0}
.head{font-weight:600}
svg{display:block;width:100%;overflow:visible}
svg text{font-size:12px;fill:var(--text);font-variant-numeric:tabular-nums}
svg .tick{fill:var(--muted)}
svg .grid{stroke:var(--line);stroke-width:1}
svg .base{stroke:var(--muted);stroke-width:1}
svg .whisker{stroke:var(--text);stroke-width:1.5}
svg .halo{stroke:var(--ground);stroke-width:3.5}
svg .disc{fill:var(--mark);stroke:var(--ground);stroke-width:1.5}
svg text.on-disc{fill:var(--ground);font-weight:700}
svg text.head{font-weight:600}
svg .faint{opacity:.4}
.chart{padding:0 .75rem 0 2.75rem;max-width:46rem}
.clean{--mark:var(--clean)}.attack{--mark:var(--attack)}.worst{--mark:var(--worst)}
.s0{--mark:var(--series0)}.s1{--mark:var(--series1)}.s2{--mark:var(--series2)}
.s3{--mark:var(--series3)}.s4{--mark:var(--series4)}.s5{--mark:var(--series5)}
svg .fill{fill:var(--mark)}
svg .hollow{fill:var(--ground);stroke:var(--mark);stroke-width:2}
svg .stroke{stroke:var(--mark);stroke-width:2;fill:none}
svg .thin{stroke:var(--mark);stroke-width:1.25;fill:none}
svg text.colour{fill:var(--mark);font-weight:600}
svg text.arrow{font-size:20px}
.key{display:inline-block;width:.7em;height:.7em;border-radius:50%;background:var(--mark);margin-right:.35em}
.key.ring{background:none;border:2px solid var(--mark)}
.confusion{font-size:.8rem}
.confusion td,.confusion th{padding:.28rem .1rem;text-align:center;border:0;min-width:1.75rem}
.confusion tbody th{text-align:right;padding-right:.4rem}
.confusion thead th{border:0;vertical-align:bottom}
.confusion td{border:1px solid var(--ground)}
.confusion .self{color:var(--muted);background:var(--raised)}
.confusion .zero{color:var(--muted)}
.badge{display:inline-block;font-weight:600;white-space:nowrap;color:var(--none)}
.badge.fail{color:var(--fail)}.badge.warn{color:var(--warn)}.badge.info{color:var(--info)}.badge.pass{color:var(--pass)}
.flag{color:var(--warn);font-weight:600}
td .flag{display:inline-block;min-width:8.5rem;white-space:normal;overflow-wrap:anywhere}
.numbers td .flag{display:block;min-width:0}
.examples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,18.5rem),1fr));gap:1rem 1.5rem;
list-style:none;margin:.75rem 0;padding:0}
.triple{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:.35rem;margin:0}
.triple img{display:block;width:100%;height:auto;image-rendering:pixelated;background:var(--raised)}
.triple span{font-size:.8rem;line-height:1.3;display:block;margin-top:.2rem}
.triple .wrong{color:var(--worst);font-weight:600}
.beside{display:grid;grid-template-columns:minmax(0,1fr);gap:0 2rem;align-items:start}
details{margin:.75rem 0}
summary{cursor:pointer;padding:.3rem 0}
.not-run{color:var(--muted)}
@media (min-width:44rem){
.facts div{display:block}
.tiles{grid-template-columns:repeat(auto-fit,minmax(13rem,1fr))}
.bars li{grid-template-columns:14rem minmax(0,1fr) 11rem;align-items:center;column-gap:1.25rem;padding:.3rem 0}
.bars .plot{grid-column:auto}
.beside{grid-template-columns:minmax(0,1.4fr) minmax(0,1fr)}
.confusion td,.confusion th{min-width:2.6rem;padding:.4rem .2rem}
.confusion{font-size:.9rem}
}
@media (max-width:43.99rem){
.bars .plot{order:3}
.stacked,.stacked tbody,.stacked tr,.stacked td,.stacked th,.stacked caption{display:block}
.stacked thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.stacked tr{border-bottom:1px solid var(--line);padding:.6rem 0}
.stacked td,.stacked th{border:0;padding:.1rem 0}
.stacked td.number,.stacked th.number{text-align:left}
.stacked td::before{content:attr(data-label) ": ";color:var(--muted)}
}
@media (min-width:68rem){.scroll:has(.numbers){width:max-content;min-width:100%;max-width:calc(100vw - 3rem);
left:50%;transform:translateX(-50%)}}
@media print{body{max-width:none}pre,.scroll{overflow:visible}nav{display:none}}
"""
