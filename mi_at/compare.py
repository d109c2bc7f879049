"""python -m mi_at.compare A B: two runs, or two sets of seeds, side by side; which difference is more than noise."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mi_at.evaluation.outcomes import CLEAN
from mi_at.results.pairing import ComparisonError, Row, Side, compare, differences, read_side, term_shares
from mi_at.results.records import RecordError, seed_keys
from mi_at.results.statistics import p_text
from mi_at.results.terminal import NOT_RUN, columns, in_words, markdown_row

HEADINGS = (
    "attack",
    "n",
    "A %",
    "B %",
    "B - A, points [95 %]",
    "p (Holm)",
    "at matched clean accuracy: A %, B % (n)",
    "B - A there [95 %]",
    "verdict",
)
TRAINING = (
    ("training, hours", "hours_of_last_start"),
    ("steps", "steps"),
    ("precision", "precision"),
    ("precision of the attack", "attack_precision"),
)
"""Titles and keys of what a run cost, of its training notes."""
MATCHED = (
    "At matched clean accuracy: of the images that both get right when clean, so that neither gains by clean accuracy."
)
TERM_HEADINGS = ("of", "loss term", "mean share of the loss", "mean share of the gradient")


def report(a: Side, b: Side, *, markdown: bool = False) -> str:
    """The comparison as text: what differs, every attack, loss terms, cost.

    Args:
        a: the first side.
        b: the second.
        markdown: tables as Markdown; plain columns otherwise.

    Returns:
        Lines, ending with a newline.

    Raises:
        ComparisonError: they were not measured alike.
    """
    rows, apart = compare(a, b)
    seeds = ", ".join(str(seed) for seed in a.seeds)
    other = "" if a.seeds == b.seeds else f" and {', '.join(str(seed) for seed in b.seeds)}"
    first, second = a.records[0], b.records[0]
    lines = [f"A: {a.name}", f"B: {b.name}", f"seeds {seeds}{other}, budget {first.budget}", ""]
    if a.records == b.records:
        lines += ["A and B are the same records: no difference is to be expected.", ""]
    seeded = {*seed_keys(first.config)} & {*seed_keys(second.config)}
    changed = [(key, str(one), str(two)) for key, one, two in differences(first, second) if key not in seeded]
    if changed:
        lines += ["What differs in their configurations:", *_table(("key", "A", "B"), changed, markdown), ""]
    lines += _table(HEADINGS, [_cells(row) for row in rows], markdown)
    lines += ["", _reading(rows, len(a.seeds)), MATCHED]
    lines += [f"not compared: {sentence}" for sentence in apart]
    attacks = [(row.name, in_words(row.says)) for row in rows if row.name != CLEAN]
    lines += ["", *_table(("attack", "what it is"), attacks, markdown)] if attacks else []
    lines += ["", *_table(("cost", "A", "B"), _costs(a, b), markdown)]
    terms = [(side_name, *row) for side_name, side in (("A", a), ("B", b)) for row in _terms(side)]
    if terms:
        lines += ["", *_table(TERM_HEADINGS, terms, markdown)]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    matched, there = NOT_RUN, NOT_RUN
    if row.both_clean and row.matched:
        first, second, n = row.both_clean
        matched, there = f"{100 * first:.2f}, {100 * second:.2f} ({n})", row.matched.points
    p = NOT_RUN if row.p is None else p_text(row.p)
    accuracies = f"{100 * row.a:.2f}", f"{100 * row.b:.2f}"
    return (row.name, str(row.n), *accuracies, row.difference.points, p, matched, there, verdict(row))


def verdict(row: Row) -> str:
    """Which side is better, where both the interval and the adjusted p-value say that it is one."""
    if not row.difference.clear or row.p is None or row.p >= 0.05:
        return "no clear difference"
    return "B is better" if row.difference.value > 0 else "A is better"


def _reading(rows: Sequence[Row], seeds: int) -> str:
    if seeds > 1:
        return f"Intervals and p-values are over {seeds} seeds (paired t, Holm's rule over attacks)."
    return (
        "Intervals and p-values are over images of one training run each (McNemar, Holm's rule over attacks): they say "
        "that these two networks differ, not that the methods do; for that, give folders with several seeds."
    )


def _costs(a: Side, b: Side) -> list[tuple[str, ...]]:
    rows = [
        (title, *(_each([record.training.get(key, NOT_RUN) for record in side.records]) for side in (a, b)))
        for title, key in TRAINING
    ]
    for title, key in (("GPU of the evaluation", "gpu"), ("processor of the evaluation", "cpu")):
        found = [_each([record.hardware.get(key, NOT_RUN) for record in side.records]) for side in (a, b)]
        rows += [(title, *found)] if set(found) != {NOT_RUN} else []
    hours = [_each([f"{record.seconds / 3600:.4f}" for record in side.records]) for side in (a, b)]
    return [*rows, ("evaluation, hours", *hours)]


def _each(values: Sequence[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _terms(side: Side) -> list[tuple[str, str, str]]:
    return [
        (term, f"{share:.3g}", NOT_RUN if gradient is None else f"{gradient:.3g}")
        for term, (share, gradient) in term_shares(side.records).items()
    ]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> list[str]:
    if markdown:
        return [markdown_row(row) for row in (headings, ["---"] * len(headings), *rows)]
    return columns([headings, *rows])


def _seed(word: str) -> int:
    if not word.strip().isdecimal():
        raise ValueError(f"--seeds {word}: expected whole numbers with commas between them, such as 0,1")
    return int(word)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mi_at.compare", description=__doc__)
    place = "a record.json, a run folder, or a folder of run folders that differ in their seed"
    parser.add_argument("a", metavar="A", help=place)
    parser.add_argument("b", metavar="B", help=place)
    parser.add_argument("--seeds", metavar="0,1", help="of the runs in the folders; all, unless some are asked for")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    given = parser.parse_args(arguments)
    try:
        seeds = None if given.seeds is None else [_seed(word) for word in given.seeds.split(",")]
        print(report(read_side(given.a, seeds), read_side(given.b, seeds), markdown=given.markdown), end="")
    except (ComparisonError, RecordError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
