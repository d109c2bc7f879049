"""Figures of the papers, drawn from records: `python -m mi_at.report table=ncmi_f2 format=svg > f2.svg`.

A figure is a table (conf/table/<paper>_f<n>.yaml) whose node names what draws it. Not there: schematic figures (ncmi 1,
shared_info 1 and 2, namid 1, 3 and 6, ib_rar 1). Robust NCMI's Figures 4 to 6, whose captions and bodies are lost, are
one (ncmi_f4).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mi_at.results.figures import bars, canvas, clouds, curves, pictures
from mi_at.results.figures.readings import Drawing, FigureError
from mi_at.results.measured import Filled
from mi_at.results.table_text import command

Plot = Callable[[Filled], Drawing]

FIGURES: Mapping[str, Plot] = {
    plot.__name__: plot
    for plot in (
        bars.adversarial_ncmi,
        bars.robust_ncmi,
        bars.by_attack,
        bars.estimated_information,
        curves.over_steps,
        curves.over_eps,
        curves.over_beta,
        curves.robust_over_natural,
        curves.training_curves,
        curves.natural_and_robust_over_epochs,
        curves.information_over_attacks,
        clouds.simplex,
        clouds.tsne,
        clouds.information_plane,
        pictures.manipulations,
    )
}
"""What `table.figure` names."""


def draw(filled: Filled) -> str:
    """A figure as one SVG that needs nothing else.

    Args:
        filled: its table, with what was measured.

    Returns:
        The file's text. Of what was not run nothing is drawn, and a note says so.

    Raises:
        FigureError: a table that is no figure, or nothing of it was run; the message says what to do.
    """
    table = filled.table
    if table.figure is None:
        figures = "a figure's yaml has figure: one of " + ", ".join(FIGURES)
        raise FigureError(
            f"table={table.name} is no figure: format=terminal, markdown, latex or csv shows it ({figures})"
        )
    if table.figure not in FIGURES:
        raise FigureError(f"table {table.name}: figure={table.figure}: expected one of {', '.join(FIGURES)}")
    run = command(filled)
    drawn = FIGURES[table.figure](filled)
    if not drawn.height:
        why = "".join(f"\n  {sentence}" for sentence in drawn.missing)
        raise FigureError(f"nothing of figure {table.name} was run at budget {filled.budget}: {run}{why}")
    parts, y = canvas.paragraph(table.title, 0, "head")
    if filled.budget != "paper":
        words, y = canvas.paragraph(f"budget {filled.budget}: not the size that the paper ran", y)
        parts += words
    parts.append(canvas.moved(drawn.parts, y + 8))
    y += 8 + drawn.height
    names, y = canvas.legend(drawn.names, y, hollow=drawn.hollow) if drawn.names else ([], y)
    parts += names
    for note in [*drawn.notes, *(_of(filled) if drawn.of_lines else ()), *drawn.missing, *_not_run(filled, run)]:
        words, y = canvas.paragraph(note, y + 2)
        parts += words
    return canvas.document(table.title, parts, y)


def _of(filled: Filled) -> list[str]:
    """How many images and seeds the numbers are of."""
    counts = sorted({line.n for line in filled.lines if line.n})
    seeds = sorted({len(line.values) for line in filled.lines if line.values})
    said = []
    if counts:
        said.append("n " + " or ".join(f"{n:,}" for n in counts))
    if seeds:
        several = seeds[-1] > 1
        said.append(f"{' or '.join(map(str, seeds))} seed{'s' * several}" + ", bars: one standard deviation" * several)
    return [", ".join(said)] if said else []


def _not_run(filled: Filled, run: str) -> list[str]:
    lacking = [cell for cell in filled.table.cells if not filled.records.get(cell)]
    return [f"not run: {', '.join(lacking)}: {run}"] if lacking else []
