"""Floor 4: records of what was measured, and tables of them."""

from mi_at.results.records import (
    Record,
    RecordError,
    config_hash,
    make_record,
    read_outcomes,
    read_record,
    run_key,
    write_record,
)
from mi_at.results.terminal import markdown_table, print_table

__all__ = [
    "Record",
    "RecordError",
    "config_hash",
    "make_record",
    "markdown_table",
    "print_table",
    "read_outcomes",
    "read_record",
    "run_key",
    "write_record",
]
