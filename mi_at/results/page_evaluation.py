"""The page of one evaluation: what was measured, how, how sure it is, and what it looks like."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mi_at.evaluation.intervals import wilson
from mi_at.evaluation.outcomes import CLEAN
from mi_at.results import page_charts, page_data, page_pictures
from mi_at.results.page_data import SEVERITIES, Measured, findings, verdict
from mi_at.results.page_html import Child, Html, document, facts, join, table, tag
from mi_at.results.records import AttackRecord, Record
from mi_at.results.terminal import BARE_FROM, NOT_RUN, format_eps, settings

SIGNS = {"fail": "✕", "warn": "!", "not checked": "–", "info": "i", "pass": "✓"}
PICTURES = 3_000_000  # bytes of pictures in a page, about: the strongest attack's are always shown
MATRIX = 20  # classes, at most, of a confusion table; more are listed
NO_BOUND = "Without a bound a number is what is left at any distance: 0 is what to expect."
CHOICES = ("defense", "regularizer", "dataset", "model", "attack", "optim", "recipe", "budget", "callback", "trainer")


def evaluation_page(measured: Measured, *, first: Mapping[str, Html] | None = None, up: Child = None) -> str:
    """The whole page of one record.

    Args:
        measured: the record, and what lies beside it.
        first: sections that come before all others.
        up: links to the pages above it.

    Returns:
        The file's text.
    """
    record = measured.record
    parts = {
        **(first or {}),
        "What was evaluated": _what(record),
        "Accuracy": _accuracy(record),
        "Audit": audit(record),
        "Curves": _curves(measured),
        "Classes": _classes(measured),
        "Confusion": _confusion(measured),
        "Strongest examples": _examples(measured),
        "Information": _information(record),
        "Loss terms": _terms(record),
        "Provenance": _provenance(record),
    }
    if not record.information:
        del parts["Information"]  # asked for by few
    lead = join([tag("p", _subtitle(record), class_="sub"), _tiles(record)])
    foot = f"mi_at {record.versions.get('mi_at', '')}, record of {record.date}, configuration {record.config_hash}"
    return document(record.key, lead, parts, foot=foot, up=up)


# ---------------------------------------------------------------- pieces that a comparison uses too


def percent(correct: int, n: int) -> str:
    """An accuracy in per cent: two decimals where n carries them.

    Example:
        >>> percent(84, 100), percent(8400, 10000)
        ('84.0', '84.00')
    """
    return f"{100 * correct / n:.{2 if n >= BARE_FROM else 1}f}"


def interval(correct: int, n: int) -> str:
    """Its 95 % interval.

    Example:
        >>> interval(84, 100)
        '[75.6, 89.9]'
    """
    low, high = wilson(correct, n)
    digits = 2 if n >= BARE_FROM else 1
    return f"[{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


def count(n: int) -> str:
    """A number of images.

    Example:
        >>> count(10000)
        'n 10,000'
    """
    return f"n {n:,}"


def _accuracy_cells(correct: int, n: int) -> list[str]:
    return [percent(correct, n), interval(correct, n), f"{n:,}"]


def bar_row(name: Child, detail: Child, row: AttackRecord | None) -> Html:
    """A line of a bar chart; `-` where nothing was run."""
    label = tag("span", name, tag("small", detail) if detail else None, class_="name")
    if row is None:
        return tag("li", label, tag("span", NOT_RUN, class_="value not-run"), tag("span", class_="plot"))
    value = tag(
        "span",
        tag("b", f"{percent(row.correct, row.n)} %"),
        tag("small", f"{interval(row.correct, row.n)} {count(row.n)}"),
        class_="value",
    )
    drawn = page_charts.bar(row.correct / row.n, wilson(row.correct, row.n), page_data.kind(row))
    return tag("li", label, drawn, value, class_=page_data.kind(row))


def bars(rows: Sequence[Html], label: str) -> Html:
    """A bar chart with its scale."""
    scale = tag("li", tag("span", class_="name"), page_charts.axis(), tag("span", class_="value"), class_="axis")
    return tag("ul", *rows, _hidden(scale), class_="bars", aria_label=label)


def not_run(why: str) -> Html:
    """What stands where there is nothing to show.

    Example:
        >>> not_run("No audit.")
        '<p class="not-run">- No audit.</p>'
    """
    return tag("p", f"{NOT_RUN} {why}", class_="not-run")


def badge(severity: str) -> Html:
    """A severity as a sign and a word, never a colour alone."""
    name = severity if severity in SIGNS else "not checked"
    kind = name if name != "not checked" else "none"
    return tag("span", f"{SIGNS[name]} {severity}", class_=f"badge {kind}")


def audit(record: Record) -> Html:
    """The findings, the gravest first; what passed is folded away."""
    said, found = verdict(record), findings(record)
    if said is None:
        return not_run("The audit was not run with this evaluation: nothing here speaks for or against its numbers.")
    known = [*SEVERITIES, *(item["severity"] for item in found)]
    counts = [(s, sum(item["severity"] == s for item in found)) for s in dict.fromkeys(known)]
    summary = join([join([badge(s), f" {number}"]) for s, number in counts if number], " · ")
    grave = [item for item in found if item["severity"] != "pass"]
    passed = [item for item in found if item["severity"] == "pass"]
    return join(
        [
            tag("p", "Verdict: ", badge(said), ". Findings: ", summary or NOT_RUN, "."),
            _audit_table("What the audit found", grave) if grave else None,
            tag("details", tag("summary", f"{len(passed)} checks passed"), _audit_table("What passed", passed))
            if passed
            else None,
        ]
    )


def curve_figure(found: Sequence[tuple[str, page_data.Curve]], over: str) -> Html:
    """Curves over eps or steps in one chart, and their numbers below.

    Args:
        found: names and curves of one norm and, over steps, one eps.
        over: "eps" or "steps".
    """
    first = found[0][1]
    series = [
        page_charts.Series(name, tuple(page_charts.Point(x, y, low, high) for x, y, low, high in curve.intervals()))
        for name, curve in found
    ]
    across = f"eps ({first.norm})" if over == "eps" else f"steps ({first.norm}, eps {format_eps(first.eps or 0)})"
    values = [x for line in series for x in (line.points[0].x, line.points[-1].x)]
    logarithmic = over == "steps" and min(values) > 0 and max(values) / min(values) >= 8
    rows = [
        [name, NOT_RUN if row == CLEAN else row, _setting(over, x), *_accuracy_cells(right, curve.n)]
        for name, curve in found
        for x, right, row in curve.points
    ]
    numbers = table(
        f"Accuracy over {over}",
        ["curve", "attack", over, "accuracy %", "95 %", "n"],
        rows,
        right=(2, 3, 4, 5),
        wide=True,
    )
    sizes = sorted({curve.n for _, curve in found})
    caption = f"Accuracy with 95 % intervals, {', '.join(count(n) for n in sizes)} at every point."
    if over == "eps":
        caption += " At eps 0 nothing is attacked. Where a curve rises, the attack fails, not the network."
    return tag(
        "figure",
        page_charts.curves(
            series, across=across, up="accuracy %", logarithmic=logarithmic, shown=lambda x: _setting(over, x)
        ),
        tag("figcaption", caption),
        tag("details", tag("summary", "The numbers"), numbers),
    )


# ---------------------------------------------------------------- top


def _subtitle(record: Record) -> str:
    data = record.names.get("dataset") or record.config.get("dataset", {}).get("name", "")
    return (
        f"{record.split} split of {data or 'the data'} · {_rule(record)} · budget {record.budget} · {record.date[:10]}"
    )


def _tiles(record: Record) -> Html:
    tiles = []
    for row in record.attacks[:1]:
        tiles.append(_tile("clean", "Clean accuracy", row, ""))
    quoted = [page_data.for_counts(record), page_data.strongest(record)]
    for row in [row for place, row in enumerate(quoted) if row is not None and row not in quoted[:place]]:
        tiles.append(_tile(page_data.kind(row), _sentence(page_data.title(row)), row, page_data.threat(row)))
    said = verdict(record)
    kind = "none" if said is None else said
    big = tag("span", NOT_RUN if said is None else badge(said), class_="big")
    below = "not run" if said is None else _audit_line(record)
    tiles.append(
        tag("li", tag("span", "Audit", class_="what"), big, tag("span", below, class_="how"), class_=kind.split()[0])
    )
    return tag("ul", *tiles, class_="tiles")


def _tile(kind: str, what: str, row: AttackRecord, how: str) -> Html:
    lines = [interval(row.correct, row.n), count(row.n), how]
    flags = tag("span", "flagged: " + ", ".join(row.flags), class_="how flag") if row.flags else None
    return tag(
        "li",
        tag("span", what, class_="what"),
        tag("span", percent(row.correct, row.n), tag("small", " %"), class_="big"),
        tag("span", " · ".join(filter(None, lines)), class_="how"),
        flags,
        class_=kind,
    )


def _audit_line(record: Record) -> str:
    found = findings(record)
    return ", ".join(
        f"{number} {severity}"
        for severity in SEVERITIES
        if (number := sum(item["severity"] == severity for item in found))
    )


def _what(record: Record) -> Html:
    data, hardware = record.config.get("dataset") or {}, record.hardware
    strong = page_data.strongest(record)
    commit = record.git.get("commit")
    dirty = " with changes that are not in it" if record.git.get("dirty") else ""
    counts = sorted({row.n for row in record.attacks}, reverse=True)
    pairs: dict[str, Child] = {
        "data": f"{record.names.get('dataset') or data.get('name') or NOT_RUN}, {record.split} split",
        "images": join([" and ".join(count(n) for n in counts), tag("br"), tag("small", record.order)]),
        "threat model": page_data.threat(strong) if strong else NOT_RUN,
        "weights": _rule(record),
        "method": _method(record),
        "model": str(record.names.get("model") or NOT_RUN),
        "evaluation": str(record.names.get("evaluation") or NOT_RUN),
        "seeds": f"training {record.seed}, attacks {record.evaluation_seed}",
        "budget": record.budget,
        "commit": join([tag("code", commit[:12]), dirty]) if commit else f"{NOT_RUN} (not a checkout)",
        "configuration": tag("code", record.config_hash),
        "date": record.date.replace("T", " ").replace("+00:00", " UTC"),
        "hardware": ", ".join(
            str(part)
            for part in (hardware.get("gpu"), hardware.get("cpu"), f"{hardware.get('threads', '?')} threads")
            if part
        ),
        "time": f"{_duration(record.seconds)} of attacks and predictions",
    }
    lines = command(record)
    if lines is None:
        repeat = not_run("The record does not tell the command.")
    else:
        words = (
            "It is the command as it was typed, without paths: the configuration comes out as "
            if any(key in record.names for key in ("typed", "trained_by"))
            else "It makes the same choices. Single values that were set on the command line besides are not in it: "
            "the run's configuration must come out as "
        )
        note = tag("p", words, tag("code", record.config_hash), ".", class_="note")
        repeat = join([tag("pre", lines, class_="command"), note])
    return join([facts(pairs), tag("h3", "To repeat it"), repeat])


def command(record: Record) -> str | None:
    """The command that evaluates again as it was typed, or that trains and evaluates again.

    Args:
        record: of a run.

    Returns:
        None where the record does not say what was chosen, or the network was given from Python.
    """
    names, config = record.names, record.config
    if names.get("typed"):
        return shlex.join(["python", "-m", "mi_at.evaluate", *map(str, names["typed"])])
    if "trained_by" in names:
        return shlex.join(["python", "-m", "mi_at.train", *map(str, names["trained_by"])])
    if "weights" in names or not all(names.get(group) for group in ("defense", "dataset", "model")):
        return None
    chosen = [(group, names[group]) for group in (*CHOICES, "evaluation") if names.get(group)]
    settings = [("seed", record.seed), *((key, config[key]) for key in ("select", "init_from") if config.get(key))]
    words = [f"{key}={_choice(value)}" for key, value in (*chosen, *settings)]
    return " ".join(["python -m mi_at.train", *(shlex.quote(word) for word in words)])


def _choice(value: Any) -> str:
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, list | tuple) else str(value)


# ---------------------------------------------------------------- accuracy


def _accuracy(record: Record) -> Html:
    parts: list[Child] = []
    groups = list(page_data.attacked(record).items())
    # A budget with one number only, a point of a curve mostly, needs no chart of its own.
    single = [rows[0] for _, rows in groups[1:] if len(rows) == 1]
    for place, (name, rows) in enumerate(groups):
        if place and len(rows) == 1:
            continue
        shown = [row for row in record.attacks if row.name == CLEAN] if place == 0 else []
        lines = [bar_row(page_data.title(row), settings(row.description), row) for row in (*shown, *rows)]
        parts += [tag("h3", name), tag("figure", bars(lines, f"Accuracy, {name}"))]
        if not page_data.bounded(rows[0]):
            parts.append(tag("p", NO_BOUND, class_="note"))
    if single:
        words = [", ".join(filter(None, [page_data.threat(row), settings(row.description)])) for row in single]
        lines = [bar_row(page_data.title(row), detail, row) for row, detail in zip(single, words, strict=True)]
        parts += [tag("h3", "Other budgets"), tag("figure", bars(lines, "Accuracy, other budgets"))]
        if not all(map(page_data.bounded, single)):
            parts.append(tag("p", NO_BOUND, class_="note"))
    if not parts:
        parts.append(tag("figure", bars([bar_row(row.name, "", row) for row in record.attacks], "Accuracy")))
        parts.append(not_run("No attack was run: this is no statement about robustness."))
    parts += [tag("h3", "Flags"), flags(record)]
    cells = [
        [
            page_data.title(row),
            percent(row.correct, row.n),
            interval(row.correct, row.n),
            f"{row.n:,}",
            NOT_RUN if row.name == CLEAN else row.norm or NOT_RUN,
            NOT_RUN if row.name == CLEAN or row.eps is None else format_eps(row.eps),
            NOT_RUN if row.steps is None else str(row.steps),
            NOT_RUN if row.step_size is None else format_eps(row.step_size),
            NOT_RUN if row.name == CLEAN else f"{row.max_distance:.4g}",
            _duration(row.seconds),
            " ".join(row.flags) or NOT_RUN,
        ]
        for row in record.attacks
    ]
    # What is read first stands first: a phone shows three columns.
    headings = ["attack", "accuracy %", "95 %", "n", "norm", "eps", "steps", "step", "farthest", "time", "flags"]
    parts.append(table("Every number", headings, cells, right=[1, 2, 3, 5, 6, 7, 8, 9], wide=True))
    return tag("div", *parts)


def flags(record: Record) -> Html:
    """A sentence for every flag; the worst cases repeat those of their members and are named with them."""
    named: dict[tuple[str, str], list[str]] = {}
    for row in record.attacks:
        for flag in row.flags:
            named.setdefault((flag, _why(record, row, flag)), []).append(page_data.title(row))
    listed = [
        tag("li", tag("b", flag), f" ({', '.join(dict.fromkeys(rows))}): {why}") for (flag, why), rows in named.items()
    ]
    return tag("ul", *listed) if listed else tag("p", "No attack was flagged.")


def _why(record: Record, row: AttackRecord, flag: str) -> str:
    """What a flag means here: the row's own sentence, or that of a member."""
    members = [other for other in record.attacks if other.name in row.description.get("members", ())]
    sentences = [other.messages[flag] for other in (row, *members) if flag in other.messages]
    return sentences[0] if sentences else "no explanation was recorded."


# ---------------------------------------------------------------- curves, classes, confusion


def _curves(measured: Measured) -> Html:
    parts: list[Child] = []
    for over in ("eps", "steps"):
        groups: dict[tuple[Any, ...], list[tuple[str, page_data.Curve]]] = {}
        for curve in page_data.curves(measured.record, measured.outcomes, over):
            groups.setdefault((curve.norm, str(curve.eps)), []).append((curve.name, curve))
        for found in groups.values():
            parts.append(tag("h3", f"Accuracy over {over}, {found[0][1].norm or 'no norm'}"))
            parts.append(curve_figure(found, over))
    return join(parts) if parts else not_run("No two attacks differ in eps or in steps alone.")


def _classes(measured: Measured) -> Html:
    record, outcomes = measured.record, measured.outcomes
    row = page_data.for_counts(record)
    found = None if row is None else page_data.predictions(row, outcomes)
    if row is None or outcomes is None or found is None:
        return not_run(_no_outcomes(measured))
    rows = page_data.classes(outcomes, found)
    weakest = sorted(rows, key=lambda item: item[3] / item[1])
    shown = rows if len(rows) <= MATRIX else weakest[:10]
    lines = [
        tag(
            "li",
            tag("span", f"class {k}", tag("small", count(n)), class_="name"),
            page_charts.dumbbell(clean / n, robust / n),
            tag(
                "span",
                f"{100 * clean / n:.1f} → ",
                tag("b", f"{100 * robust / n:.1f} %"),
                tag("small", _interval(robust, n)),
                class_="value",
            ),
        )
        for k, n, clean, robust in shown
    ]
    numbers = table(
        "Accuracy by class",
        ["class", "n", "clean %", "95 %", f"{page_data.title(row)} %", "95 %"],
        [
            [str(k), f"{n:,}", f"{100 * c / n:.1f}", _interval(c, n), f"{100 * r / n:.1f}", _interval(r, n)]
            for k, n, c, r in (rows if shown is rows else weakest)
        ],
        right=range(1, 6),
        wide=True,
    )
    caption = tag(
        "figcaption",
        tag("span", class_="key ring clean"),
        "clean, ",
        tag("span", class_="key worst"),
        f"{page_data.title(row)} ({_members(row)}{page_data.threat(row)}), {count(row.n)}.",
        " The ten weakest classes." if shown is not rows else None,
    )
    return tag(
        "figure",
        caption,
        bars(lines, "Clean and robust accuracy by class"),
        tag("details", tag("summary", "The numbers"), numbers),
    )


def _confusion(measured: Measured) -> Html:
    row, outcomes = page_data.for_counts(measured.record), measured.outcomes
    found = None if row is None else page_data.predictions(row, outcomes)
    if row is None or outcomes is None or found is None:
        return not_run(_no_outcomes(measured))
    counts = page_data.confusion(outcomes, found)
    under = f"{page_data.title(row)} ({_members(row)}{page_data.threat(row)}), {count(row.n)}"
    totals = counts.sum(axis=1)
    if len(counts) > MATRIX:
        pairs = sorted(
            ((int(counts[a, b]), a, b) for a in range(len(counts)) for b in range(len(counts)) if a != b), reverse=True
        )
        rows = [[f"{a} → {b}", str(c), f"{100 * c / totals[a]:.1f}"] for c, a, b in pairs[:20] if c]
        return table(
            f"The most frequent mistakes under {under}",
            ["class → taken for", "images", "% of the class"],
            rows,
            right=(1, 2),
        )
    size = range(len(counts))
    body = []
    for true in size:
        cells = []
        for said in size:
            number = int(counts[true, said])
            share = number / totals[true] if totals[true] else 0.0
            kind = "self" if true == said else "zero" if not number else None
            # Mistakes are a few per cent where a network is any good: the square root makes them visible. Half a
            # colour leaves the text its contrast.
            heat = f"background:rgb(var(--heat)/{min(0.5, share**0.5):.3f})" if kind is None else None
            cells.append(tag("td", f"{number}" if number else "·", class_=kind, style=heat))
        body.append(tag("tr", tag("th", true, scope="row"), *cells))
    head = tag("tr", tag("th", "class", scope="col"), *(tag("th", said, scope="col") for said in size))
    caption = (
        f"True class down, what it is taken for across, under {under}. Images that are wrong when clean count too."
    )
    made = tag(
        "table", tag("caption", tag("span", caption)), tag("thead", head), tag("tbody", *body), class_="confusion"
    )
    return tag("div", made, class_="scroll", tabindex=0, role="region", aria_label="Confusion under attack")


def _interval(correct: int, n: int) -> str:
    """With one decimal whatever n: classes are compared with one another."""
    low, high = wilson(correct, n)
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def _no_outcomes(measured: Measured) -> str:
    row = page_data.strongest(measured.record)
    if row is None:
        return "No attack with a bound was run."
    if measured.outcomes is None:
        return "The outcomes per image are not beside the record."
    return f"The outcomes beside the record do not give its number for {row.name}: are they another evaluation's?"


def _members(row: AttackRecord) -> str:
    return ", ".join(row.description["members"]) + "; " if row.attack == page_data.WORST else ""


# ---------------------------------------------------------------- examples, terms, provenance


def _examples(measured: Measured) -> Html:
    record = measured.record
    known = {name: found for name, found in measured.examples.items() if len(found.label)}
    if not known:
        why = "were kept" if measured.examples else "lie beside the record"
        return not_run(f"No examples {why}.")
    rows = {row.name: row for row in record.attacks}
    order = sorted(known, key=lambda name: _strength(rows.get(name)))
    first = order[0]
    parts: list[Child] = [
        tag(
            "p",
            "What each attack broke most convincingly: the images whose wrong class the network is surest of. "
            "In a difference mid-grey is what stays, black and white are the largest change.",
            class_="note",
        ),
        tag("h3", _heading(first, rows.get(first))),
        page_pictures.triples(first, known[first]),
    ]
    spent, left = len(str(parts[-1])), []
    for name in order[1:]:
        block = page_pictures.triples(name, known[name])
        spent += len(block)
        if spent > PICTURES:
            left.append(name)
            continue
        parts.append(tag("details", tag("summary", _heading(name, rows.get(name))), block))
    if left:
        parts.append(tag("p", f"Left out, to keep the page small: {', '.join(left)}.", class_="note"))
    return tag("div", *parts)


def _strength(row: AttackRecord | None) -> tuple[bool, float]:
    """Attacks with a bound first, the strongest of them first."""
    return (True, 1.0) if row is None else (row.eps is None, row.accuracy)


def _heading(name: str, row: AttackRecord | None) -> str:
    return name if row is None else f"{name}, {page_data.threat(row)}"


def _terms(record: Record) -> Html:
    terms = record.training.get("terms")
    kinds = {"share": "Share of the loss", "gradient": "Length of its gradient, as a share of the whole loss's"}
    parts: list[Child] = []
    for kind, heading in kinds.items():
        found = [
            (str(key)[len(kind) + 1 :], numbers)
            for key, value in (terms.items() if isinstance(terms, Mapping) else ())
            if str(key).startswith(kind + "/") and (numbers := _range_of(value)) is not None
        ]
        if not found:
            continue
        top = max(1.0, *(high for _, (_, _, high) in found))
        lines = [
            tag(
                "li",
                tag("span", name, class_="name"),
                page_charts.span(low, mean, high, top=top),
                tag("span", tag("b", f"{mean:.3f}"), tag("small", f"{low:.3f} to {high:.3f}"), class_="value"),
            )
            for name, (low, mean, high) in found
        ]
        scale = f" The scale ends at {top:.2f}." if top > 1 else " The scale ends at 1."
        parts.append(tag("h3", heading))
        caption = tag("figcaption", "Mean over training, and the range from its least to its greatest value." + scale)
        parts.append(tag("figure", caption, tag("ul", *lines, class_="bars", aria_label=heading)))
    return join(parts) if parts else not_run("The record says nothing about the terms of the loss.")


def _range_of(value: Any) -> tuple[float, float, float] | None:
    """Least, mean and greatest; None where one of them is no finite number."""
    if not isinstance(value, Mapping):
        return None
    numbers = [value.get(key) for key in ("min", "mean", "max")]
    if not all(isinstance(number, int | float) for number in numbers):
        return None
    low, mean, high = (float(number) for number in numbers if number is not None)
    return low, mean, high


def _information(record: Record) -> Html:
    """Conditional mutual information, separation and their ratio, of all outputs."""
    found = record.information
    parts = ("n", "cmi", "separation", "ncmi")
    rows = [
        [str(name), *(_plain(values[part]) if part in values else NOT_RUN for part in parts)]
        for name, values in found.items()
        if isinstance(values, Mapping)
    ]
    note = "In nats. CMI: how far outputs of one class lie apart; separation: those of two classes; NCMI: their ratio."
    return table(note, ["outputs under", *parts], rows, right=range(1, 5), wide=True)


def _provenance(record: Record) -> Html:
    notes = {k: v for k, v in record.training.items() if not isinstance(v, Mapping)}
    longer = {f"Training: {k}": v for k, v in record.training.items() if isinstance(v, Mapping) and k != "terms"}
    blocks = {
        "Configuration": record.config,
        "Attacks, as they described themselves": {row.name: row.description for row in record.attacks},
        "What was chosen": record.names,
        "Settings of the audit": record.audit.get("settings") or {},
        "Tags": record.tags,
        **longer,
    }
    return join(
        [
            tag("h3", "Versions"),
            facts(dict(record.versions)),
            tag("h3", "Hardware"),
            facts({key: str(value) for key, value in record.hardware.items()}),
            tag("h3", "Commit"),
            tag("p", tag("code", record.git.get("commit") or NOT_RUN), _dirty(record)),
            tag("h3", "Training"),
            facts({key: _plain(value) for key, value in notes.items()} | {"processes": str(record.processes)}),
            *(
                tag(
                    "details",
                    tag("summary", name),
                    tag("pre", json.dumps(value, indent=1, ensure_ascii=False), tabindex=0),
                )
                for name, value in blocks.items()
                if value
            ),
        ]
    )


def _dirty(record: Record) -> str:
    state = record.git.get("dirty")
    return "" if state is None else " with changes that are not in it" if state else " without changes"


# ---------------------------------------------------------------- words


def _rule(record: Record) -> str:
    if "weights" in record.names:
        return f"weights {record.checkpoint.get('name') or record.checkpoint.get('rule', NOT_RUN)}"
    rule, where = str(record.checkpoint.get("rule", NOT_RUN)), []
    if record.checkpoint.get("served"):
        where.append(f"served {record.checkpoint['served']}")
    for key in ("epoch", "step"):
        if record.checkpoint.get(key) is not None:
            where.append(f"{key} {record.checkpoint[key]}")
    return f"{rule} checkpoint" + (f" ({', '.join(where)})" if where else "")


def _method(record: Record) -> str:
    if "weights" in record.names:
        return f"{record.names['weights']}, trained elsewhere"
    added = record.names.get("regularizer")
    words = [str(record.names.get("defense") or NOT_RUN)]
    if added and added != "none":
        words.append(_choice(added).strip("[]").replace(",", " + "))
    return " + ".join(words)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _setting(over: str, x: float) -> str:
    return format_eps(x) if over == "eps" else f"{x:g}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _hidden(item: Html) -> Html:
    return Html(item.replace("<li", '<li aria-hidden="true"', 1))


def _audit_table(caption: str, found: Sequence[Mapping[str, Any]]) -> Html:
    headings = ["check", "severity", "measured", "threshold", "what it means", "what to do"]
    rows = [
        [
            item["check"],
            badge(item["severity"]),
            item["measured"],
            item["threshold"],
            item["meaning"],
            item["todo"],
        ]
        for item in found
    ]
    return table(caption, headings, rows, stacked=True)
