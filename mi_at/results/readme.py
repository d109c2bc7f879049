"""Tables of the README, generated from the records in results/ so that no number is typed.

`python -m mi_at.results.readme` rewrites what stands between `<!-- table: NAME -->` and `<!-- end -->`; a test fails
where the README and the records differ.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mi_at.results.records import Record, read_record
from mi_at.results.terminal import NOT_RUN, format_accuracy, format_eps, markdown_row, markdown_table

ROOT = Path(__file__).resolve().parents[2]
HEAD_TO_HEAD = {
    "clean": "clean",
    "fgsm": "FGSM",
    "pgd_20": "PGD-20",
    "pgd_50x10": "PGD-50 x 10",
    "cw_50x10": "CW-inf-50 x 10",
    "square": "Square",
    "autoattack": "AutoAttack",
    "adaptive": "its own loss",
    "worst": "worst of all",
}
TABLE_8_CELLS = {method: method for method in ("standard_at", "trades", "mart", "mimae")}
# Rows of MIMAE-AT's Table 8 by title, attack in print and ours; then the attacks that cross the ball.
TABLE_8 = (
    ("Natural", "clean", "clean"),
    ("FGSM", "fgsm", "fgsm_as_printed"),
    ("PGD-20", "pgd20", "pgd_20"),
    ("PGD-40", "pgd40", "pgd_40"),
    ("CW-inf", "cw_linf", "cw_inf"),
    ("PGD-l2", "pgd_l2", "pgd_l2"),
    ("FGSM, one step of 0.3", "", "fgsm"),
    ("PGD-40, step 0.01", "", "pgd_40_honest"),
)
TABLE_4_CELLS = {f"mnist_{method}": method for method in ("standard_at", "trades", "mma", "mart", "shared_info")}
TABLE_4 = (
    ("Clean", "clean", "clean"),
    ("PGD-20", "pgd20", "pgd_20"),
    ("PGD-40", "pgd40", "pgd_40"),
    ("C&W l2", "cw_l2", "cw_l2"),
    ("AutoAttack", "autoattack", "autoattack"),
)


def render(text: str, root: Path = ROOT) -> str:
    """The README with its tables made anew.

    Args:
        text: the README.
        root: of the checkout.

    Returns:
        The text, with the tables of today's records.

    Raises:
        ValueError: a marker names a table there is no maker for.
    """
    makers = {"head_to_head_mnist": head_to_head, "mimae_t8": mimae_table_8, "shared_info_t4": shared_info_table_4}

    def made_anew(match: re.Match[str]) -> str:
        name = match[1]
        if name not in makers:
            raise ValueError(f"<!-- table: {name} -->: expected one of {', '.join(makers)}")
        return f"<!-- table: {name} -->\n{makers[name](root)}<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", made_anew, text, flags=re.DOTALL)


def head_to_head(root: Path) -> str:
    """Every method under one protocol on MNIST, a row per cell; <method>_without is its control, its term off."""
    table = (root / "conf/table/head_to_head_mnist.yaml").read_text().partition("\n  cells:\n")[2]
    # Names alone, read as text: this floor knows no OmegaConf.
    cells = re.findall(r"^    (\w+):", table, flags=re.MULTILINE)
    records = _records(root / "results/measured/head_to_head_mnist_cnn4_short", cells)
    return markdown_table([_with_union(record) for record in records], HEAD_TO_HEAD, first="cell")


def mimae_table_8(root: Path) -> str:
    """MIMAE-AT's Table 8: what it printed / what our short run of its recipe measured, a column per method."""
    return _printed_beside_measured(root, "mimae_t8_short", TABLE_8, TABLE_8_CELLS, _printed(root, "mimae", "8"))


def shared_info_table_4(root: Path) -> str:
    """Shared Information's Table 4, its MNIST half, in the same way."""
    printed = _printed(root, "shared_info", "4", dataset="mnist")
    return _printed_beside_measured(root, "shared_info_t4_short", TABLE_4, TABLE_4_CELLS, printed)


def _printed_beside_measured(
    root: Path,
    folder: str,
    attacks: Sequence[tuple[str, str, str]],
    cells: Mapping[str, str],
    printed: Mapping[tuple[str, str], str],
) -> str:
    """A row for each attack, a column for each method."""
    records = _records(root / "results/measured" / folder, [*cells])
    methods = [cells[record.key] for record in records]
    lines = [
        markdown_row(["attack", "step", "steps", *methods, "n", "flags"]),
        markdown_row(["---", *["---:"] * (3 + len(methods)), "---"]),
    ]
    for title, paper, name in attacks:
        found = [record[name] for record in records]
        one = found[0]
        if len({(row.n, row.step_size, row.steps) for row in found}) > 1:
            raise ValueError(f"{folder}: {name} of its records differs in n, step or steps, but a row holds one attack")
        pairs = [
            f"{printed.get((method, paper), NOT_RUN)} / {format_accuracy(row.correct, row.n)}"
            for method, row in zip(methods, found, strict=True)
        ]
        step = NOT_RUN if one.step_size is None else format_eps(one.step_size)
        steps = NOT_RUN if one.steps is None else str(one.steps)
        flagged = dict(zip(methods, (row.flags for row in found), strict=True))
        lines.append(markdown_row([title, step, steps, *pairs, str(one.n), _flags(flagged)]))
    return "\n".join(lines) + "\n"


def _flags(flagged: Mapping[str, Sequence[str]]) -> str:
    """The flags of a row's numbers; of which methods, where it is not all of them."""
    having: dict[str, list[str]] = {}
    for method, flags in flagged.items():
        for flag in flags:
            having.setdefault(flag, []).append(method)
    words = [f if len(who) == len(flagged) else f"{f} ({', '.join(who)})" for f, who in having.items()]
    return " ".join(words) or NOT_RUN


def _printed(root: Path, paper: str, table: str, *, dataset: str | None = None) -> dict[tuple[str, str], str]:
    """The numbers of a paper's table by defense and attack."""
    with (root / f"results/reported/{paper}.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == table and dataset in (None, row["dataset"])]
    return {(row["defense"], row["attack"]): row["value"] for row in rows}


def _records(folder: Path, cells: Sequence[str]) -> list[Record]:
    """The records of a table's cells, a folder each with one for every seed, in its order and under its names."""
    found = {cell: sorted((folder / cell).glob("seed*/record.json")) for cell in cells}
    return [replace(read_record(path), key=cell) for cell, paths in found.items() for path in paths]


def _with_union(record: Record) -> Record:
    """The record with the worst case over most attacks under a name of its own."""
    unions = [row for row in record.attacks if row.attack == "worst_of"]
    if not unions:
        return record
    union = max(unions, key=lambda row: len(row.description["members"]))
    return replace(record, attacks=(*record.attacks, replace(union, name="worst")))


def main() -> None:
    """Rewrite the README's tables."""
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
