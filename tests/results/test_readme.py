"""The README's tables are those of the records."""

from __future__ import annotations

from pathlib import Path

import pytest

from mi_at.results.readme import ROOT, render


def test_tables_are_those_of_the_records() -> None:
    text = (ROOT / "README.md").read_text()
    assert render(text) == text, "run `make tables`"


def test_an_unknown_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mimae_t99.*head_to_head_mnist"):
        render("<!-- table: mimae_t99 -->\n<!-- end -->", tmp_path)
