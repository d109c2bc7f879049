"""The page that sets several evaluations side by side; it never mixes n, eps or settings of an attack."""

from __future__ import annotations

from collections.abc import Sequence

from mi_at.evaluation.intervals import wilson
from mi_at.evaluation.outcomes import CLEAN
from mi_at.results import page_charts, page_data
from mi_at.results.page_data import Column, Measured, verdict
from mi_at.results.page_evaluation import (
    audit,
    badge,
    bar_row,
    bars,
    count,
    curve_figure,
    flags,
    interval,
    not_run,
    percent,
)
from mi_at.results.page_html import SERIES, Child, Html, document, join, table, tag
from mi_at.results.records import AttackRecord
from mi_at.results.statistics import Difference, paired_over_images
from mi_at.results.terminal import NOT_RUN


def comparison_page(all_measured: Sequence[Measured]) -> str:
    """The whole page of several records.

    Args:
        all_measured: the records and what lies beside them; differences are taken to the first.

    Returns:
        The file's text.
    """
    records = [measured.record for measured in all_measured]
    names = page_data.short_names(records)
    found = page_data.columns(records)
    parts = {
        "Trade-off": _trade_off(names, found),
        "All numbers": _numbers(names, all_measured, found),
        "Paired differences": _differences(names, all_measured, found),
        "Accuracy": _bars(names, found),
        "Curves": _curves(names, all_measured),
        "Audits": _audits(names, all_measured),
        "Runs": _runs(names, all_measured),
    }
    title = f"{len(records)} evaluations compared"
    return document(title, _lead(names, all_measured), parts, foot="mi_at: every number is one of a record's.")


def _lead(names: Sequence[str], all_measured: Sequence[Measured]) -> Html:
    records = [measured.record for measured in all_measured]
    facts = {
        "data": {f"{r.names.get('dataset') or NOT_RUN}, {r.split} split" for r in records},
        "model": {str(r.names.get("model") or NOT_RUN) for r in records},
        "evaluation": {str(r.names.get("evaluation") or NOT_RUN) for r in records},
        "budget": {r.budget for r in records},
        "checkpoint": {str(r.checkpoint.get("rule", NOT_RUN)) for r in records},
    }
    alike = [f"{what} {next(iter(values))}" for what, values in facts.items() if len(values) == 1]
    apart = [f"{what} ({', '.join(sorted(values))})" for what, values in facts.items() if len(values) > 1]
    warning = (
        tag("p", tag("b", "Not alike: "), "; ".join(apart), ". What differs here can explain a difference below.")
        if apart
        else None
    )
    return join(
        [
            tag("p", ", ".join(names), class_="sub"),
            tag("p", "In common: " + "; ".join(alike) + ".", class_="sub") if alike else None,
            warning,
        ]
    )


def _heading(column: Column) -> str:
    """The column's attack with eps and n, which are the same in all of its rows."""
    row = column.any
    words = [page_data.title(row), *([page_data.threat(row)] if row.name != CLEAN else []), count(row.n)]
    return ", ".join(words)


def _detail(row: AttackRecord) -> str | None:
    return ", ".join(row.description["members"]) if row.attack == page_data.WORST else None


def _trade_off(names: Sequence[str], found: Sequence[Column]) -> Html:
    pair = page_data.trade_off(found)
    if pair is None:
        return not_run("No two of the records have clean accuracy and one attack with a bound in common.")
    x, y = pair
    both = [
        (name, clean, robust)
        for name, clean, robust in zip(names, x.rows, y.rows, strict=True)
        if clean is not None and robust is not None
    ]
    detail = _detail(y.any)
    words = f"The better, the farther up and to the right; lines are 95 % intervals. Up: {_heading(y)}"
    words += (f" ({detail})" if detail else "") + f". Across: {_heading(x)}."
    up = page_data.title(y.any)
    chart = page_charts.scatter(
        [_point(clean, robust) for _, clean, robust in both], across="clean accuracy %", up=f"accuracy %, {up}"
    )
    rows: list[list[Child]] = [
        [f"{place} {name}", _cell(clean), _cell(robust)] for place, (name, clean, robust) in enumerate(both, start=1)
    ]
    shown = {name for name, _, _ in both}
    rows += [[name, *(_cell(column.rows[names.index(name)]) for column in pair)] for name in names if name not in shown]
    numbers = table("The numbers in the chart, %", ["run", *(_heading(column) for column in pair)], rows, right=(1, 2))
    return tag("figure", tag("figcaption", words), tag("div", chart, numbers, class_="beside"))


def _point(clean: AttackRecord, robust: AttackRecord) -> page_charts.Point:
    low, high = wilson(robust.correct, robust.n)
    x_low, x_high = wilson(clean.correct, clean.n)
    return page_charts.Point(clean.accuracy, robust.accuracy, low, high, x_low, x_high)


def _bars(names: Sequence[str], found: Sequence[Column]) -> Html:
    parts: list[Child] = []
    for column in found:
        heading = _heading(column)
        parts.append(tag("h3", heading))
        detail = _detail(column.any)
        lines = [
            bar_row(
                name, tag("span", " ".join(row.flags), class_="flag") if row is not None and row.flags else None, row
            )
            for name, row in zip(names, column.rows, strict=True)
        ]
        parts.append(tag("figure", tag("figcaption", detail) if detail else None, bars(lines, f"Accuracy, {heading}")))
    return tag("div", *parts)


def _numbers(names: Sequence[str], all_measured: Sequence[Measured], found: Sequence[Column]) -> Html:
    headings = ["run", "audit", *(_heading(column) for column in found)]
    rows: list[list[Child]] = []
    for place, (name, measured) in enumerate(zip(names, all_measured, strict=True)):
        said = verdict(measured.record)
        cells = (_cell(column.rows[place]) for column in found)
        rows.append([name, NOT_RUN if said is None else badge(said), *cells])
    note = f"In per cent, with 95 % intervals. {NOT_RUN}: not run, or not at these settings on this n."
    parts: list[Child] = [table(note, headings, rows, right=range(2, len(headings)))]
    for name, measured in zip(names, all_measured, strict=True):
        if any(row.flags for row in measured.record.attacks):
            parts += [tag("h3", f"Flags of {name}"), flags(measured.record)]
    return tag("div", *parts)


def _cell(row: AttackRecord | None) -> Child:
    if row is None:
        return NOT_RUN
    doubts = tag("small", " ".join(row.flags), class_="flag") if row.flags else None
    value = tag("small", interval(row.correct, row.n))
    return join([percent(row.correct, row.n), tag("br"), value, tag("br") if doubts else None, doubts])


# ---------------------------------------------------------------- differences


def _differences(names: Sequence[str], all_measured: Sequence[Measured], found: Sequence[Column]) -> Html:
    first, others = all_measured[0], range(1, len(all_measured))
    gaps: list[tuple[Column, list[Difference | None]]] = []
    for column in found:
        line = [_gap(first, all_measured[place], column.rows[0], column.rows[place]) for place in others]
        if any(gap is not None for gap in line):
            gaps.append((column, line))
    if not gaps:
        return not_run(f"{names[0]} shares no attack with another record whose outcomes are of the same images.")
    pair = page_data.trade_off(found)
    shown = [column for column in ((pair[0], pair[1]) if pair else (gaps[0][0],)) if column in [c for c, _ in gaps]]
    parts: list[Child] = [
        tag(
            "p",
            f"Run minus {names[0]} on the same images, in percentage points, with 95 % intervals "
            "(1.96 standard errors of the paired difference). What one gets right and the other wrong counts; "
            "where the interval leaves 0 out, the difference is more than chance of which images were drawn. "
            "It says nothing of other seeds.",
            class_="note",
        )
    ]
    for column, line in gaps:
        if column not in shown:
            continue
        own = _reach([gap for gap in line if gap is not None])
        lines = [_gap_row(names[place], gap, own) for place, gap in zip(others, line, strict=True)]
        parts.append(tag("h3", _heading(column)))
        caption = f"From {_points(-own)} to {_points(own)} points; the line is no difference."
        parts.append(
            tag(
                "figure",
                tag("figcaption", caption),
                tag("ul", *lines, class_="bars", aria_label=f"Difference, {_heading(column)}"),
            )
        )
    rows = [[names[place], *(_gap_text(line[place - 1]) for _, line in gaps)] for place in others]
    caption = f"Points more than {names[0]}, and 95 % interval"
    parts.append(
        table(caption, ["run", *(_heading(column) for column, _ in gaps)], rows, right=range(1, len(gaps) + 1))
    )
    return tag("div", *parts)


def _gap(a: Measured, b: Measured, one: AttackRecord | None, two: AttackRecord | None) -> Difference | None:
    """b - a on the images of both; None where the outcomes do not give it."""
    if one is None or two is None or a.outcomes is None or b.outcomes is None:
        return None
    first, second = page_data.predictions(one, a.outcomes), page_data.predictions(two, b.outcomes)
    if first is None or second is None or not page_data.same_images(a.outcomes, b.outcomes, one.n):
        return None
    label = a.outcomes["label"][: one.n]
    return paired_over_images(first == label, second == label)


def _reach(gaps: Sequence[Difference]) -> float:
    """How far a scale must go for all differences but those far beyond all others."""
    edge = page_charts.outlying([-abs(gap.value) for gap in gaps])
    return max((max(abs(gap.low), abs(gap.high)) for gap in gaps if -abs(gap.value) >= edge), default=0.0) or 0.01


def _gap_row(name: str, gap: Difference | None, reach: float) -> Html:
    label = tag("span", name, class_="name")
    if gap is None:
        return tag("li", label, tag("span", NOT_RUN, class_="value not-run"), tag("span", class_="plot"))
    value = tag("span", tag("b", _points(gap.value)), tag("small", _limits(gap)), class_="value")
    return tag("li", label, page_charts.difference(gap.value, gap.low, gap.high, reach), value)


def _gap_text(gap: Difference | None) -> Child:
    if gap is None:
        return NOT_RUN
    text = join([_points(gap.value), tag("br"), tag("small", _limits(gap))])
    return tag("b", text) if gap.clear else text


def _points(value: float) -> str:
    return f"{100 * value:+.2f}".replace("-", "−")


def _limits(gap: Difference) -> str:
    return f"[{_points(gap.low)}, {_points(gap.high)}] {count(gap.n)}"


# ---------------------------------------------------------------- the rest


def _curves(names: Sequence[str], all_measured: Sequence[Measured]) -> Html:
    parts: list[Child] = []
    for over in ("eps", "steps"):
        groups: dict[tuple[str, str, str, int], list[tuple[str, page_data.Curve]]] = {}
        for name, measured in zip(names, all_measured, strict=True):
            for curve in page_data.curves(measured.record, measured.outcomes, over):
                key = (curve.name, str(curve.norm), str(curve.eps), curve.n)
                groups.setdefault(key, []).append((name, curve))
        for (what, norm, *_), found in groups.items():
            for start in range(0, len(found), SERIES):  # a chart has no more colours
                parts.append(tag("h3", f"{what}, accuracy over {over}, {norm}"))
                parts.append(curve_figure(found[start : start + SERIES], over))
    return join(parts) if parts else not_run("No record has attacks that differ in eps or in steps alone.")


def _audits(names: Sequence[str], all_measured: Sequence[Measured]) -> Html:
    if all(verdict(measured.record) is None for measured in all_measured):
        return not_run("No evaluation here was audited.")
    parts: list[Child] = []
    for name, measured in zip(names, all_measured, strict=True):
        parts += [tag("h3", name), audit(measured.record)]
    return tag("div", *parts)


def _runs(names: Sequence[str], all_measured: Sequence[Measured]) -> Html:
    rows = []
    for name, measured in zip(names, all_measured, strict=True):
        record = measured.record
        commit = str(record.git.get("commit") or NOT_RUN)[:12] + ("+" if record.git.get("dirty") else "")
        machine = str(record.hardware.get("gpu") or record.hardware.get("cpu") or NOT_RUN)
        rule = str(record.checkpoint.get("rule", NOT_RUN))
        made = tag("code", commit), tag("code", record.config_hash)
        rows.append([name, record.key, record.date[:10], rule, record.budget, *made, machine])
    headings = ["run", "key", "date", "checkpoint", "budget", "commit", "configuration", "hardware"]
    return table("Where the numbers come from (+: with changes that are not in the commit)", headings, rows, wide=True)
