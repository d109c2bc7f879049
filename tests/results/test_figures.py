"""Figures: what was measured is drawn where it belongs, what was not is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from mi_at.attacks.representation import Representation
from mi_at.results import figures
from mi_at.results.figures import bars, canvas, clouds, curves, draw
from mi_at.results.figures.readings import FigureError, Value, over_seeds, run_folder
from mi_at.results.measured import NOT_SETTINGS, Filled, Found
from tests.results import figure_makers as makers
from tests.results.figure_makers import FOLDER, filled, table_of

SVG = "{http://www.w3.org/2000/svg}"
NAMES = sorted(path.stem for path in FOLDER.glob("*_f[0-9].yaml"))
ESTIMATES = {
    "n": 1000,
    "natural_clean": 1.9,
    "natural_adversarial": 0.7,
    "own": 1.3,
    "adversarial_clean": 0.4,
    "adversarial_adversarial": 1.1,
    "natural_least": -1.2,
    "adversarial_least": -0.8,
    "least": -1.2,
}


def measured(name: str, folder: Path, **options: object) -> Filled:
    """A figure's table with all that it needs."""
    table = table_of(name)
    information = {"robust_ncmi": {"n": 1000, "ncmi": 0.52}, "autoattack": {"n": 1000, "ncmi": 0.31}}
    information["mutual_information"] = dict.fromkeys(table.more, ESTIMATES)  # type: ignore[assignment]
    made = filled(table, folder, information=information, **options)  # type: ignore[arg-type]
    makers.probed(made, table.more[-1])
    makers.planes(made)
    makers.outputs(made, table.more, n=16, images=2 if "clean" in table.more or "features_5_255" in table.more else 0)
    return made


def root_of(made: Filled) -> ElementTree.Element:
    return ElementTree.fromstring(draw(made))


def words_of(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


# ---------------------------------------------------------------- every figure
def test_the_figures_of_the_issue_are_there() -> None:
    wanted = {"ncmi": (2, 3, 4, 7, 8, 9), "shared_info": (3, 4), "namid": (2, 4, 5, 7), "ib_rar": (2, 3, 4, 5, 6)}
    assert sorted(f"{paper}_f{number}" for paper, numbers in wanted.items() for number in numbers) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_is_drawn_within_its_edges_and_says_what_it_is(name: str, tmp_path: Path) -> None:
    made = measured(name, tmp_path)
    if name == "shared_info_f4":
        makers.outputs(made, ["clean", *made.table.more], n=16, images=2)
    root = root_of(made)
    words = words_of(root)
    assert made.table.number is None
    assert " ".join(words).startswith(made.table.title.split(",")[0][:40])
    assert any("budget smoke" in word for word in words)
    assert not any("not run" in word for word in words)
    low, _, width, _ = (float(part) for part in root.attrib["viewBox"].split())
    for element in root.iter(f"{SVG}text"):
        length = len(element.text or "") * canvas.LETTER * (1.08 if "head" in element.attrib.get("class", "") else 1)
        at = float(element.attrib["x"])
        before = {"end": length, "middle": length / 2}.get(element.attrib.get("text-anchor", ""), 0.0)
        assert low <= at - before, element.text
        assert at - before + length <= low + width + 4, element.text
    for element in root.iter(f"{SVG}circle"):
        assert low <= float(element.attrib["cx"]) <= low + width
    assert "http" not in draw(made).replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_run_is_an_error_with_the_command(name: str, tmp_path: Path) -> None:
    with pytest.raises(FigureError, match=rf"python -m mi_at\.train -m table={name} budget=smoke"):
        draw(filled(table_of(name), tmp_path, cells=[]))


def test_what_was_not_run_is_named_and_not_drawn(tmp_path: Path) -> None:
    words = " ".join(words_of(root_of(measured("ncmi_f2", tmp_path, cells=["ce", "mart"]))))
    assert "not run: standard_at, trades, trades_awp: python -m mi_at.train -m table=ncmi_f2" in words
    assert "vanilla AT" not in words
    assert "MART" in words


def test_a_table_is_no_figure(tmp_path: Path) -> None:
    made = filled(table_of("ncmi_f2"), tmp_path)
    made.table = replace(made.table, figure=None)
    with pytest.raises(FigureError, match="is no figure"):
        draw(made)
    made.table = replace(made.table, figure="pie")
    with pytest.raises(FigureError, match="figure=pie: expected one of adversarial_ncmi"):
        draw(made)


def test_every_figure_is_named_by_a_table() -> None:
    assert {table_of(name).figure for name in NAMES} == set(figures.FIGURES)


# ---------------------------------------------------------------- bars
def test_bars_are_as_long_as_their_numbers_each_on_its_own_scale() -> None:
    groups = [
        bars.Group("a", {0: Value(50, 0), 1: Value(0.2, 0)}),
        bars.Group("b", {0: Value(100, 0), 1: Value(0.4, 0)}),
    ]
    first, second = canvas.Scale("%", 0, 100), canvas.Scale("ncmi", 0, 0.4)
    drawn = bars.bars(groups, first, second, 1)
    svg = ElementTree.fromstring(canvas.document("t", drawn.parts, drawn.height))
    lengths = [float(bar.attrib["width"]) for bar in svg.iter(f"{SVG}rect") if bar.attrib.get("class") == "fill"]
    whole = canvas.WIDTH - bars.NUMBERS
    assert lengths == pytest.approx([whole / 2, whole / 2, whole, whole])


def test_information_of_another_n_is_refused(tmp_path: Path) -> None:
    made = measured("ncmi_f2", tmp_path)
    each = made.records["trades"][0]
    other = {"autoattack": {"n": 20, "ncmi": 0.9}}
    made.records["trades"] = [Found(each.path, replace(each.record, information=other))]
    words = " ".join(words_of(root_of(made)))
    assert "trades: autoattack ncmi of another n than 1000, that of the others: refused" in words
    assert "0.9" not in words


def test_information_is_shown_above_the_worst_sample(tmp_path: Path) -> None:
    words = words_of(root_of(measured("namid_f4", tmp_path)))
    for number in ("3.1", "1.9", "1.2"):  # 1.9, 0.7 and 0.4 above -1.2, -1.2 and -0.8
        assert number in words


def test_one_worst_sample_is_the_zero_of_all_attacks(tmp_path: Path) -> None:
    table = table_of("namid_f2")
    of = {attack: {**ESTIMATES, "least": -1.0 - place} for place, attack in enumerate(table.more)}
    drawn = curves.information_over_attacks(filled(table, tmp_path, information={"mutual_information": of}))
    svg = ElementTree.fromstring(canvas.document("t", drawn.parts, drawn.height))
    lines = [line.attrib["points"].split() for line in svg.iter(f"{SVG}polyline")]
    heights = [{float(point.split(",")[1]) for point in line} for line in lines]
    assert [len(own) for own in heights] == [1, 1, 1], "level: the estimates are the same under every attack"
    assert max(heights[0]) < max(heights[1]) < max(heights[2]), "1.9, 1.3 and 0.7 nats"


# ---------------------------------------------------------------- lines
def test_a_dot_lies_where_its_numbers_are() -> None:
    panel = canvas.Panel(10, 20, 100, 50, canvas.Scale("x", 0, 10), canvas.Scale("y", 0, 100))
    group = ElementTree.fromstring(panel.line(0, [canvas.Dot(0, 0), canvas.Dot(5, 50, 10), canvas.Dot(10, 100)]))
    assert [(c.attrib["cx"], c.attrib["cy"]) for c in group.iter("circle")] == [
        ("10.0", "70.0"),
        ("60.0", "45.0"),
        ("110.0", "20.0"),
    ]
    (whisker,) = group.iter("line")
    assert (whisker.attrib["y1"], whisker.attrib["y2"]) == ("50.0", "40.0")
    (line,) = group.iter("polyline")
    assert line.attrib["points"] == "10.0,70.0 60.0,45.0 110.0,20.0"


def test_seeds_give_means_and_error_bars(tmp_path: Path) -> None:
    assert over_seeds([1.0, 3.0]) == Value(2.0, 2**0.5)
    one, three = (draw(measured("shared_info_f3", tmp_path / str(n), seeds=range(n))) for n in (1, 3))
    assert 'class="thin"' not in one
    assert 'class="thin"' in three
    assert "3 seeds, bars: one standard deviation" in three


def test_the_curve_over_eps_begins_at_the_clean_accuracy(tmp_path: Path) -> None:
    made = filled(table_of("ncmi_f4"), tmp_path, numbers=lambda cell, attack, seed: 90.0 - 10 * attack)
    drawn = curves.over_eps(made)
    svg = ElementTree.fromstring(canvas.document("t", drawn.parts, drawn.height))
    lines = [line.attrib["points"].split() for line in svg.iter(f"{SVG}polyline")]
    assert len(lines) == 8
    assert {len(line) for line in lines} == {9}
    heights = [float(point.split(",")[1]) for point in lines[0]]
    assert heights == sorted(heights), "accuracy falls, so y grows"
    assert np.allclose(np.diff(heights), np.diff(heights)[0], atol=0.15)


def test_epochs_come_from_what_training_wrote(tmp_path: Path) -> None:
    made = filled(table_of("ncmi_f9"), tmp_path)
    with pytest.raises(FigureError, match=r"was trained without probe\.jsonl.*delete that folder"):
        draw(made)
    makers.probed(made, "cw_inf_40", epochs=5)
    lines = [line.attrib["points"].split() for line in root_of(made).iter(f"{SVG}polyline")]
    assert [len(line) for line in lines] == [5, 5, 5, 5]
    in_legend = 2
    assert len(list(root_of(made).iter(f"{SVG}circle"))) == 20 + in_legend
    makers.probed(made, "cw_inf_40", epochs=40)
    assert len(list(root_of(made).iter(f"{SVG}circle"))) == in_legend, "a line of many epochs needs no marks"
    makers.probed(made, "cw_inf_40", epochs=5)
    (tmp_path / "ours-s0" / "probe.jsonl").unlink()
    assert "ours: " in " ".join(words_of(root_of(made)))


@pytest.mark.parametrize(
    ("values", "low"), [([0.0, 0.0], 0.0), ([0.1, 10.0], 0.0), ([20.0, 60.0], 18.0), ([-1.0, 1.0], -1.1)]
)
def test_a_scale_goes_below_zero_only_where_a_value_does(values: list[float], low: float) -> None:
    assert canvas.scale_of("accuracy, %", values).low == pytest.approx(low)


def test_a_record_of_another_evaluation_lies_deeper(tmp_path: Path) -> None:
    record = makers.filled(table_of("ncmi_f9"), tmp_path).records["ours"][0].record
    assert run_folder(Found(tmp_path / "run/record.json", record)) == tmp_path / "run"
    assert run_folder(Found(tmp_path / "run/evaluations/ncmi-1/record.json", record)) == tmp_path / "run"


# ---------------------------------------------------------------- clouds
def test_a_sure_output_lies_in_its_corner() -> None:
    sides = clouds.CORNERS - np.roll(clouds.CORNERS, 1, axis=0)
    np.testing.assert_allclose(np.linalg.norm(sides, axis=1), 1)
    logits = np.array([[50.0, 0, 0], [0, 50.0, 0], [0, 0, 50.0], [0, 50.0, 50.0]])
    np.testing.assert_allclose(clouds.on_simplex(logits)[:3], clouds.CORNERS, atol=1e-9)
    np.testing.assert_allclose(clouds.on_simplex(logits)[3], clouds.CORNERS[1:].mean(axis=0), atol=1e-9)


def test_the_plane_has_a_point_for_each_line(tmp_path: Path) -> None:
    made = filled(table_of("ib_rar_f5"), tmp_path)
    makers.planes(made, points=7)
    assert len(list(root_of(made).iter(f"{SVG}circle"))) == 14
    file = next(iter(made.records.values()))[0].path.with_name("information_plane.jsonl")
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 7


# ---------------------------------------------------------------- pictures
def test_the_guides_that_an_evaluation_binds_are_no_setting_of_a_cell() -> None:
    planned = Representation(eps="10/255", steps=20)
    ran = planned.with_guides(torch.zeros(2, 1, 8, 8), torch.arange(2))
    one, two = planned.describe(), ran.describe()
    assert {key for key in one if one[key] != two[key]} <= set(NOT_SETTINGS)


def test_a_picture_shows_the_images_and_marks_what_is_fooled(tmp_path: Path) -> None:
    made = filled(table_of("shared_info_f4"), tmp_path)
    makers.outputs(made, ["clean", *made.table.more], n=16, images=2)
    path = made.records["ce"][0].path.with_name("outputs.npz")
    arrays = dict(np.load(path))
    for name in ("clean", *made.table.more):
        arrays[f"{name}.logits"][:2] = np.eye(makers.CLASSES)[[0, 1]]
    arrays["block5_10_255.logits"][0] = np.eye(makers.CLASSES)[3]
    np.savez(path, **arrays)
    root = root_of(made)
    assert len(list(root.iter(f"{SVG}image"))) == 2 * 7
    marked = [e.text for e in root.iter(f"{SVG}text") if e.attrib.get("class") == "head" and "class" in (e.text or "")]
    assert marked == ["class 3"]
