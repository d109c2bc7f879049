"""A page to send: one HTML file per evaluation or comparison, which needs nothing else, not even a script.

`python -m mi_at.results.page RECORD... -o compare.html` makes one from records; a path may be a record.json or the
folder it lies in.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mi_at.evaluation.outcomes import Examples
from mi_at.results.examples import beside
from mi_at.results.page_comparison import comparison_page
from mi_at.results.page_data import Measured
from mi_at.results.page_evaluation import evaluation_page
from mi_at.results.records import Record, RecordError, read_record, write_atomically

PAGE = "record.html"
Parts = tuple[Record, Mapping[str, np.ndarray] | None, Mapping[str, Examples] | None]


def write_page(path: str | Path, records: Sequence[str | Path | Parts]) -> Path:
    """Write the page of one evaluation, or of the comparison of several.

    Args:
        path: of the HTML file; `PAGE` beside the record by custom.
        records: one or more: the path of a record (the outcomes and examples beside it are used where they are
            there), or the record with its outcomes and examples. Differences are taken to the first.

    Returns:
        The path of the page, written whole or not at all.

    Raises:
        RecordError: a record is missing or damaged, the page cannot be written, or there is no record.
    """
    if isinstance(records, str | Path):
        raise RecordError(f"records={records!r}: expected a list of records")
    measured = [_measured(item) for item in records]
    if not measured:
        raise RecordError("a page needs a record: give the path of one or more")
    text = evaluation_page(measured[0]) if len(measured) == 1 else comparison_page(measured)
    write_atomically(Path(path), text.encode())
    return Path(path)


def _measured(item: str | Path | Parts) -> Measured:
    if isinstance(item, tuple):
        record, outcomes, examples = item
        return Measured(record=record, outcomes=outcomes, examples=examples or {})
    path = Path(item)
    if path.is_dir():
        path /= "record.json"
    record, (outcomes, examples) = read_record(path), beside(path)
    return Measured(record=record, outcomes=outcomes, examples=examples)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mi_at.results.page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD", help="record.json, or the folder it lies in")
    parser.add_argument("-o", "--output", type=Path, help=f"default: {PAGE} beside one record, compare.html of several")
    given = parser.parse_args(arguments)
    first: Path = given.records[0]
    own = (first if first.is_dir() else first.parent) / PAGE
    output = given.output or (own if len(given.records) == 1 else Path("compare.html"))
    try:
        print(write_page(output, given.records))
    except RecordError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
