"""Pages of evaluations and comparisons: what they say, that they ask nothing of anybody, and that nothing breaks in."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mi_at.attacks.fgsm import FGSM
from mi_at.evaluation.outcomes import AttackResult, EvaluationResult
from mi_at.results import page, page_charts, page_data, page_html
from mi_at.results.examples import read_examples, write_examples
from mi_at.results.records import Record, RecordError, read_outcomes, read_record, write_record
from tests.results import pages
from tests.results.pages import MEASURED, Tree

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One evaluation on disk, with all that can lie beside a record."""
    place, result = tmp_path_factory.mktemp("run"), pages.evaluation()
    write_record(place / "record.json", pages.record(result), result)
    write_examples(place / "examples.npz", pages.examples(result))
    return place


def written(path: Path, records: Any) -> str:
    return page.write_page(path, records).read_text()


def section(text: str, name: str) -> str:
    (found,) = re.findall(rf'<section id="{page_html.anchor(name)}".*?</section>', text, flags=re.DOTALL)
    return str(found)


# ---------------------------------------------------------------- every page


def every_page(kind: str, folder: Path, tmp_path: Path) -> str:
    (record, outcomes, examples) = (
        read_record(folder / "record.json"),
        read_outcomes(folder / "record.npz"),
        read_examples(folder / "examples.npz"),
    )
    sources: dict[str, Callable[[], Any]] = {
        "one": lambda: [folder / "record.json"],
        "bare": lambda: [(record, None, None)],
        "no attacks": lambda: [(replace(record, attacks=record.attacks[:1]), outcomes, examples)],
        "old": lambda: [MEASURED[0]],
        "two": lambda: [folder, folder],
        "unlike": lambda: [folder, MEASURED[0], (replace(record, attacks=record.attacks[:1]), None, None)],
        "old ones": lambda: MEASURED,
    }
    return written(tmp_path / "page.html", sources[kind]())


KINDS = ("one", "bare", "no attacks", "old", "two", "unlike", "old ones")


@pytest.mark.parametrize("kind", KINDS)
def test_every_page_is_whole_asks_nothing_and_can_be_read_by_all(kind: str, folder: Path, tmp_path: Path) -> None:
    text = every_page(kind, folder, tmp_path)
    tree = Tree(text)
    assert text.startswith("<!doctype html>\n<html lang=")

    # No request, no script.
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in tree.tags}
    for _, attributes in tree.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "action", "data", "poster", "background", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), attributes
    assert not re.search(r"https?:|//\w|url\(|@import", tree.styles)
    assert {"content": page_html.POLICY, "http-equiv": "Content-Security-Policy"} in tree.of("meta")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in tree.of("meta")
    assert "default-src 'none'" in page_html.POLICY

    # Headings in order, one at the top; names for all that is no text.
    levels = [int(tag[1]) for tag, _ in tree.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    ids = [attributes["id"] for _, attributes in tree.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {link["href"] for link in tree.of("a")} <= {f"#{name}" for name in ids}
    assert all(image["alt"] for image in tree.of("img"))
    assert all(heading.get("scope") in ("row", "col") for heading in tree.of("th"))
    assert len(tree.of("caption")) == len(tree.of("table"))
    for drawn in tree.of("svg"):
        assert drawn.get("aria-hidden") == "true" or (drawn.get("role") == "img" and drawn.get("aria-label"))
    assert "nan" not in tree.text.lower().split()
    assert "None" not in tree.text.split()


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.parent.parent.name)
def test_measured_records_have_a_page_that_says_what_they_lack(path: Path, tmp_path: Path) -> None:
    text = written(tmp_path / "page.html", [path])
    record = read_record(path)
    assert ("- The audit was not run" in section(text, "Audit")) is not bool(record.audit)
    assert "- No examples lie beside the record" in section(text, "Strongest examples")
    assert "<td" in section(text, "Confusion")
    assert record.config_hash in text


def test_every_number_has_its_interval_and_n(folder: Path, tmp_path: Path) -> None:
    record = read_record(folder / "record.json")
    text = written(tmp_path / "page.html", [folder])
    lines = re.findall(r"<li class=\"(?:clean|attack|worst)\">.*?</li>", section(text, "Accuracy"))
    assert len(lines) == len(record.attacks)
    for row, line in zip(sorted(record.attacks, key=lambda row: order(text, row)), lines, strict=True):
        low, high = row.interval
        assert f"<b>{100 * row.accuracy:.1f} %</b>" in line
        assert f"[{100 * low:.1f}, {100 * high:.1f}] n {row.n}" in line
        assert f'width="{100 * row.accuracy:.4g}%"' in line
    plain = Tree(text).text
    assert "python -m mi_at.train defense=mimae dataset=digits model=cnn_tiny evaluation=quick seed=0" in plain


def test_weights_trained_elsewhere(folder: Path, tmp_path: Path) -> None:
    record = read_record(folder / "record.json")
    names = {"weights": "theirs", "defense": "own", "regularizer": "none", "dataset": "cifar10", "model": "net"}
    other = replace(
        record,
        names={
            **names,
            "evaluation": "quick",
            "typed": ["checkpoint=theirs v1.pt", "model._target_=my.Net", "dataset=cifar10", "evaluation=quick"],
        },
        checkpoint={"rule": "file", "name": "theirs v1.pt", "weights": "0123"},
        config={**record.config, "model": {"_target_": "my.Net"}},
    )
    plain = Tree(written(tmp_path / "page.html", [(other, None, None)])).text
    wanted = "python -m mi_at.evaluate 'checkpoint=theirs v1.pt' model._target_=my.Net dataset=cifar10 evaluation=quick"
    assert wanted in plain
    assert "theirs, trained elsewhere" in plain
    assert "weights theirs v1.pt" in plain
    at_hand = replace(other, names={**names, "evaluation": "quick"}, checkpoint={"rule": "at hand"})
    assert "- The record does not tell the command" in written(tmp_path / "page.html", [(at_hand, None, None)])
    assert page_data.short_names([other, replace(other, names={**names, "weights": "ours"})])[:2] == [
        "theirs quick",
        "ours",
    ]


def test_information_is_shown_where_it_was_measured(folder: Path, tmp_path: Path) -> None:
    record = read_record(folder / "record.json")
    assert 'id="information"' not in written(tmp_path / "page.html", [(record, None, None)])
    record = replace(record, information={"clean": {"n": 60, "cmi": 0.25, "separation": 2.0, "ncmi": 0.125}, "x": 1})
    text = section(written(tmp_path / "page.html", [(record, None, None)]), "Information")
    assert re.findall(r"<t[dh] [^>]*>([^<]*)</t[dh]>", text)[-5:] == ["clean", "60", "0.25", "2", "0.125"]


def order(text: str, row: Any) -> int:
    return section(text, "Accuracy").index(f'<span class="name">{page_data.title(row)}<')


def test_flags_are_put_into_words(tmp_path: Path) -> None:
    result = pages.evaluation(attacks={"pgd": pages.PGD(eps=0.4, step_size=0.001, steps=3), "fgsm": FGSM(eps=0.4)})
    text = section(written(tmp_path / "page.html", [(pages.record(result), None, None)]), "Accuracy")
    assert "<b>reach</b> (pgd): 3 steps of 0.001 cannot cross a ball of eps 0.4" in text


# ---------------------------------------------------------------- parts of an evaluation


def test_classes_and_confusion_are_counted_right(folder: Path, tmp_path: Path) -> None:
    record, outcomes = read_record(folder / "record.json"), read_outcomes(folder / "record.npz")
    row = page_data.for_counts(record)
    assert row is not None
    found = page_data.predictions(row, outcomes)
    assert found is not None
    label, clean = outcomes["label"], outcomes["clean.prediction"]
    size = max(*label, *found) + 1
    counts = np.zeros((size, size), int)
    for true, said in zip(label, found, strict=True):
        counts[true, said] += 1
    assert (page_data.confusion(outcomes, found) == counts).all()
    assert counts.trace() == row.correct
    for k, n, right, robust in page_data.classes(outcomes, found):
        assert n == sum(label == k)
        assert right == sum((label == k) & (clean == k))
        assert robust == counts[k, k]
    text = written(tmp_path / "page.html", [folder])
    cells = re.findall(r"<td[^>]*>(.*?)</td>", section(text, "Confusion"))
    assert [int(cell.replace("·", "0")) for cell in cells] == counts.ravel().tolist()
    lines = re.findall(r"<li><span class=\"name\">class.*?</li>", section(text, "Classes"))
    assert len(lines) == len(set(label))
    _, n, right, robust = page_data.classes(outcomes, found)[2]
    assert f"{100 * right / n:.1f} → <b>{100 * robust / n:.1f} %</b>" in lines[2]
    assert f"<small>n {n}</small>" in lines[2]


def test_worst_cases_are_those_of_the_evaluator(tmp_path: Path) -> None:
    result = pages.evaluation(n_of={"pgd_5": 40})
    outcomes, record = pages.outcomes(result, tmp_path), pages.record(result)
    unions = result.worst_cases()
    assert len(unions) >= 2
    for union in unions:
        found = page_data.predictions(record[union.name], outcomes)
        assert found is not None
        assert (found == union.prediction.numpy()).all()
    assert any((found.prediction != result.clean.prediction[: found.n]).any() for found in unions)


def test_the_first_attack_that_breaks_an_image_has_the_last_word_on_it(tmp_path: Path) -> None:
    label = torch.tensor([0, 0, 0, 0])
    said = {"clean": [0, 0, 0, 3], "a": [0, 1, 1, 3], "b": [2, 0, 2, 3]}

    def attack(name: str) -> AttackResult:
        description = {"attack": name, "norm": "linf", "eps": 0.1 if name != "clean" else 0.0}
        prediction = torch.tensor(said[name])
        return AttackResult(
            name=name, description=description, label=label, prediction=prediction, distance=torch.zeros(4)
        )

    attacks = {name: attack(name) for name in ("a", "b")}
    result = EvaluationResult(
        index=torch.arange(4),
        label=label,
        clean=attack("clean"),
        attacks=attacks,
        num_classes=4,
        seed=0,
        batch_size=4,
    )
    found = page_data.predictions(pages.record(result)["worst of a, b"], pages.outcomes(result, tmp_path))
    assert found is not None
    assert found.tolist() == [2, 1, 1, 3] == result.worst_cases()[0].prediction.tolist()


def test_outcomes_of_another_evaluation_are_not_shown(folder: Path, tmp_path: Path) -> None:
    record, outcomes = read_record(folder / "record.json"), read_outcomes(folder / "record.npz")
    other = {**outcomes, "label": (outcomes["label"] + 1) % 4}
    text = written(tmp_path / "page.html", [(record, other, None)])
    assert "do not give its number" in section(text, "Confusion")
    assert "<svg" not in section(text, "Classes")


def test_many_classes_are_listed_instead_of_drawn(tmp_path: Path) -> None:
    record, outcomes = read_record(MEASURED[0]), read_outcomes(MEASURED[0].with_suffix(".npz"))
    spread = {k: 3 * v if k == "label" or k.endswith("prediction") else v for k, v in outcomes.items()}
    text = written(tmp_path / "page.html", [(record, spread, None)])
    assert "most frequent mistakes" in section(text, "Confusion")
    row = page_data.for_counts(record)
    assert row is not None
    counts = page_data.confusion(spread, page_data.predictions(row, spread))  # type: ignore[arg-type]
    np.fill_diagonal(counts, 0)
    true, said = np.unravel_index(counts.argmax(), counts.shape)
    first = re.findall(r"<tbody><tr><th[^>]*>(.*?)</th><td[^>]*>(.*?)</td>", section(text, "Confusion"))
    assert first == [(f"{true} → {said}", str(counts.max()))]


def test_the_row_to_quote(tmp_path: Path) -> None:
    record = pages.record(pages.evaluation())
    strongest = page_data.strongest(record)
    assert strongest is not None
    assert strongest.attack == "worst_of"
    assert page_data.radius(strongest) == pytest.approx(0.05), (
        "the evaluation's own eps, though a larger one breaks more"
    )
    own = replace(record, config={**record.config, "evaluation": {"eps": "1/10"}})
    assert page_data.strongest(own) == own["pgd_5_eps_2"], "though the other has more attacks"
    alone = pages.record(pages.evaluation(attacks={"fgsm": FGSM(eps=0.05)}))
    assert page_data.strongest(alone) == alone["fgsm"]
    assert page_data.strongest(replace(alone, attacks=alone.attacks[:1])) is None
    assert page_data.strongest(alone, least=61) is None
    assert page_data.for_counts(alone) == alone["fgsm"]
    measured = read_record(
        next(path for path in MEASURED if path.parent.parent.name == "mimae" and "head" in str(path))
    )
    counted, quoted = page_data.for_counts(measured), page_data.strongest(measured)
    assert counted is not None
    assert quoted is not None
    assert (counted.n, quoted.n) == (1000, 200)


# ---------------------------------------------------------------- curves


def test_curves_are_what_differs_in_one_setting(folder: Path) -> None:
    record, outcomes = read_record(folder / "record.json"), read_outcomes(folder / "record.npz")
    (eps,) = page_data.curves(record, outcomes, "eps")
    assert [name for *_, name in eps.points] == ["clean", "pgd_5", "pgd_5_eps_2", "pgd_5_eps_4"]
    assert [x for x, *_ in eps.points] == pytest.approx([0, 0.05, 0.1, 0.2])
    assert [right for _, right, _ in eps.points] == [record[name].correct for *_, name in eps.points]
    (steps,) = page_data.curves(record, outcomes, "steps")
    assert [(x, name) for x, _, name in steps.points] == [(1, "pgd_1"), (5, "pgd_5"), (10, "pgd_10")]
    assert (eps.name, steps.name, steps.n, steps.eps) == ("pgd_5", "pgd", 60, 0.05)
    with pytest.raises(ValueError, match="expected eps or steps"):
        page_data.curves(record, outcomes, "seed")


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [({}, 1), ({"restarts": 2}, 0), ({"objective": "margin"}, 0), ({"n": 30}, 0), ({"step_size": 0.02}, 0)],
)
def test_another_setting_makes_no_curve(changed: dict[str, Any], wanted: int) -> None:
    record = pages.record(pages.evaluation(attacks={k: pages.attacks()[k] for k in ("pgd_5", "pgd_5_eps_2")}))
    row = record["pgd_5_eps_2"]
    fields = {k: v for k, v in changed.items() if k in ("n", "step_size")}
    if "n" in changed:
        fields |= {"correct": 10, "accuracy": 1 / 3}
    settings = {k: v for k, v in changed.items() if k != "n"}
    other = replace(row, **fields, description={**row.description, **settings})
    record = replace(record, attacks=(*record.attacks[:2], other))
    assert len(page_data.curves(record, None, "eps")) == wanted


def test_clean_accuracy_begins_a_curve_on_the_same_images(tmp_path: Path) -> None:
    chosen = {k: pages.attacks()[k] for k in ("pgd_5", "pgd_5_eps_2")}
    result = pages.evaluation(attacks=chosen, n_of={"pgd_5": 20, "pgd_5_eps_2": 20})
    record = pages.record(result)
    (with_outcomes,) = page_data.curves(record, pages.outcomes(result, tmp_path), "eps")
    right = int((result.clean.prediction[:20] == result.label[:20]).sum())
    assert with_outcomes.points[0] == (0.0, right, "clean")
    (without,) = page_data.curves(record, None, "eps")
    assert [name for *_, name in without.points] == ["pgd_5", "pgd_5_eps_2"], "clean is of 60 images there"


# ---------------------------------------------------------------- audit


def with_audit(record: Record, audit: Any) -> Record:
    return replace(record, audit=audit)


def test_the_audit_says_the_gravest_first_and_its_verdict_stands_at_the_top(folder: Path, tmp_path: Path) -> None:
    record = with_audit(read_record(folder / "record.json"), pages.AUDIT)
    text = written(tmp_path / "page.html", [(record, None, None)])
    shown = section(text, "Audit")
    places = [shown.index(f">{name}<") for name in ("unbounded", "steps", "adaptive", "reach")]
    assert places == sorted(places)
    for finding in pages.FINDINGS:
        for part in ("measured", "threshold", "meaning", "todo"):
            assert f">{finding[part] or '-'}</td>" in shown
    assert shown.index("<details>") < places[-1], "what passed is folded away"
    assert '<span class="badge fail">✕ fail</span>' in text[: text.index("<nav")]
    assert "1 fail, 1 warn, 1 not checked, 1 pass" in text[: text.index("<nav")]


@pytest.mark.parametrize(
    ("audit", "said"),
    [
        ({"findings": pages.FINDINGS[:2]}, "! warn"),
        ({"findings": []}, "– not checked"),
        ({"verdict": "catastrophe", "findings": [{"check": "x", "severity": "catastrophe"}]}, "– catastrophe"),
        ({"verdict": "pass", "findings": "none"}, "✓ pass"),
    ],
)
def test_audits_of_other_shapes_are_shown_too(audit: Any, said: str, folder: Path, tmp_path: Path) -> None:
    record = with_audit(read_record(folder / "record.json"), audit)
    text = written(tmp_path / "page.html", [(record, None, None)])
    Tree(text)
    assert said in section(text, "Audit")


# ---------------------------------------------------------------- nothing breaks in

NASTY = """"'><script>alert(1)</script></style><!-- <img src=x onerror=y> & &amp; -->"""


def planted(record: Record, word: str) -> Record:
    """Every string that a page shows and does not compute with, replaced."""
    rows = tuple(
        replace(
            row, flags=(word,), messages={word: word}, description={**row.description, "objective": word, word: word}
        )
        if row.name == "fgsm"
        else row
        for row in record.attacks
    )
    names = dict.fromkeys(("defense", "dataset", "model", "evaluation", "regularizer"), word)
    finding = dict.fromkeys(("check", "measured", "threshold", "meaning", "todo"), word)
    made = replace(
        record,
        key=word,
        names=names,
        split=word,
        order=word,
        attacks=rows,
        checkpoint={"rule": word, "epoch": word},
        budget=word,
        git={"commit": word, "dirty": True},
        config_hash=word,
        config={**record.config, word: {word: [word]}, "select": word},
        versions={word: word},
        hardware={"cpu": word, "gpu": word, word: word},
        date=word,
        training={"terms": {f"share/{word}": {"min": 0.0, "mean": 0.5, "max": 1.0}}, word: word},
        tags={word: word},
    )
    return with_audit(made, {"verdict": "warn", "findings": [{"severity": "warn", **finding}, {"severity": word}]})


def skeleton(text: str) -> list[Any]:
    """Tags and the names of their attributes."""
    return [(tag, sorted(attributes)) for tag, attributes in Tree(text).tags]


@pytest.mark.parametrize("many", [1, 2])
def test_what_comes_from_a_record_is_text(many: int, folder: Path, tmp_path: Path) -> None:
    read, result = read_record(folder / "record.json"), pages.evaluation()
    outcomes = read_outcomes(folder / "record.npz")
    known = pages.examples(result)
    texts = []
    for word in ("harmless", NASTY):
        examples = {word: known["fgsm"], "pgd_5": known["pgd_5"]}
        source = (planted(read, word), outcomes, examples)
        texts.append(written(tmp_path / "page.html", [source] * many))
    assert skeleton(texts[0]) == skeleton(texts[1])
    tree = Tree(texts[1])
    assert "script" not in {tag for tag, _ in tree.tags}
    assert texts[1].count("<!--") == 0
    assert texts[1].count("</style>") == 1
    assert " ".join(NASTY.split()) in tree.text


def test_tags_escape_and_refuse() -> None:
    made = page_html.tag("a", "<b>", page_html.Html("<b>"), href='"', hidden=True, title=None, lang=False)
    assert made == '<a href="&quot;" hidden>&lt;b&gt;<b></a>'
    assert page_html.tag("rect", x=1) == '<rect x="1"/>'
    with pytest.raises(ValueError, match="img"):
        page_html.tag("img", "x")


# ---------------------------------------------------------------- comparisons


def test_a_comparison_never_mixes_settings(folder: Path, tmp_path: Path) -> None:
    one = read_record(folder / "record.json")
    other = {"fgsm": FGSM(eps=0.02), "pgd_5": pages.PGD(eps=0.04, step_size=0.0125, steps=5)}
    weaker = pages.record(pages.evaluation(seed=1, attacks={**pages.attacks(), **other}))
    fewer = pages.record(pages.evaluation(seed=2, n=40))
    found = page_data.columns([one, weaker, fewer])
    for name in ("fgsm", "pgd_5"):
        there = [[row is not None for row in column.rows] for column in found if column.name == name]
        assert there == [[True, False, False], [False, True, False], [False, False, True]], name
    assert found[0].name == "clean"
    assert found[-1].any.attack == "worst_of"
    for column in found:
        there = [row for row in column.rows if row is not None]
        assert len({(row.n, row.eps, row.steps, row.step_size) for row in there}) == 1
    text = section(written(tmp_path / "page.html", [(r, None, None) for r in (one, weaker, fewer)]), "All numbers")
    assert "fgsm, linf, eps 0.02, n 60" in text
    assert "fgsm, linf, eps 0.05, n 40" in text
    cells = re.findall(r"<td[^>]*>(.*?)</td>", text)
    assert cells.count("-") == 3 + sum(row is None for column in found for row in column.rows)


def test_paired_differences_are_of_the_same_images(tmp_path: Path) -> None:
    results = [pages.evaluation(seed=seed) for seed in (0, 1)]
    sources = [(pages.record(result), pages.outcomes(result, tmp_path), None) for result in results]
    text = section(written(tmp_path / "page.html", sources), "Paired differences")
    first, second = (result["pgd_5"].correct.numpy() for result in results)
    gap = second.astype(float) - first.astype(float)
    more = np.array([*gap, np.sqrt(0.5), -np.sqrt(0.5)])  # half an image more in each of the four cells
    error = more.std() / np.sqrt(len(more))
    assert abs(gap.mean()) > 0
    shown = f"{100 * gap.mean():+.2f}".replace("-", "−")
    low = f"{100 * (more.mean() - 1.959964 * error):+.2f}".replace("-", "−")
    assert f"{shown}<br><small>[{low}," in text

    # The same network again: no difference, of 60 images.
    text = section(written(tmp_path / "page.html", [sources[0], sources[0]]), "Paired differences")
    assert "+0.00<br><small>[−3.16, +3.16] n 60" in text
    # Other images: nothing may be said.
    moved = {**sources[1][1], "index": sources[1][1]["index"] + 1}
    text = section(written(tmp_path / "page.html", [sources[0], (sources[1][0], moved, None)]), "Paired differences")
    assert "shares no attack" in text
    text = section(written(tmp_path / "page.html", [sources[0], (sources[1][0], None, None)]), "Paired differences")
    assert "shares no attack" in text


def test_the_trade_off_is_of_the_strongest_attack_in_common() -> None:
    records = [read_record(path) for path in MEASURED if "head_to_head" in str(path)]
    pair = page_data.trade_off(page_data.columns(records))
    assert pair is not None
    assert pair[0].name == "clean"
    assert len(pair[1].any.description["members"]) == 7
    assert all(row is not None for column in pair for row in column.rows)
    alone = replace(records[0], attacks=records[0].attacks[:1])
    assert page_data.trade_off(page_data.columns([alone, alone])) is None
    assert page_data.trade_off(page_data.columns([records[0], alone])) is None


def test_what_is_not_alike_is_said_first(folder: Path, tmp_path: Path) -> None:
    text = written(tmp_path / "page.html", [folder, MEASURED[0]])
    assert "Not alike" in text[: text.index("<nav")]
    assert "digits, test split, mnist, test split" in text[: text.index("<nav")]


def test_short_names_tell_records_apart() -> None:
    found = {path.parent.parent.name: read_record(path) for path in MEASURED if "head_to_head" in str(path)}
    methods = ["ce", "standard_at", "trades", "mart", "mimae", "shared_info", "namid", "ib_rar", "ncmi"]
    records = [found[method] for method in methods]
    assert page_data.short_names(records) == methods
    assert page_data.short_names([found["trades"], found["trades_ib_rar"]]) == ["trades", "trades+ib_rar"]
    method_and_control = [found["ib_rar"], found["ib_rar_without"]]
    assert page_data.short_names(method_and_control) == ["ib_rar alpha=0.008 beta=0.08", "ib_rar alpha=0 beta=0"]
    assert page_data.short_names([found["shared_info"], *method_and_control]) == [
        "shared_info",
        "ib_rar alpha=0.008 beta=0.08",
        "ib_rar alpha=0 beta=0",
    ]
    one = records[0]
    assert page_data.short_names([one, replace(one, seed=1)]) == ["ce s0", "ce s1"]
    other = next(record for record in records if record.names["defense"] == "mart")
    assert page_data.short_names([one, one, other]) == ["ce #1", "ce #2", "mart"]
    elsewhere = replace(one, config={**one.config, "optim": {f"option_{k}": k for k in range(9)}})
    assert page_data.short_names([one, elsewhere]) == ["ce #1", "ce #2"]
    evaluated = replace(one, config={**one.config, "evaluation": {**one.config["evaluation"], "seed": 9}})
    assert page_data.short_names([one, evaluated]) == ["ce seed=0", "ce seed=9"]
    added = replace(one, names={**one.names, "regularizer": "[ncmi,ib_rar]"})
    assert page_data.short_names([added, one]) == ["ce+ncmi+ib_rar", "ce"]


# ---------------------------------------------------------------- charts


def test_labels_keep_apart_and_as_near_as_they_can() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        wanted = rng.uniform(0, 200, rng.integers(1, 9)).tolist()
        found = page_charts.spread(wanted, 0, 200)
        ordered = sorted(found)
        assert all(b - a >= page_charts.LINE - 0.11 for a, b in pairwise(ordered))
        assert np.argsort(found).tolist() == np.argsort(wanted).tolist()
        assert ordered[0] >= 0
        assert ordered[-1] <= 200
        alone = [abs(a - b) > 8 * page_charts.LINE for a in wanted for b in wanted if a != b]
        if alone and all(alone):
            assert found == pytest.approx(wanted, abs=0.06)


def test_ticks_are_round_and_inside() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        low, high = sorted(rng.uniform(0, 1, 2))
        if high - low > 1e-3:
            ticks = page_charts.ticks(low, high)
            assert 2 <= len(ticks) <= 7
            assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
            step = (ticks[1] - ticks[0]) / 10 ** np.floor(np.log10(ticks[1] - ticks[0]) + 1e-9)
            assert round(step, 6) in (1, 2, 5)


def numbers(markup: str, shape: str, name: str) -> list[float]:
    return [float(value.rstrip("%")) for value in re.findall(rf'<{shape}[^>]* {name}="([-\d.]+%?)"', markup)]


def test_curves_and_scatters_put_points_where_they_belong() -> None:
    points = tuple(page_charts.Point(x, y, y - 0.1, y + 0.1) for x, y in ((1, 0.9), (10, 0.5), (100, 0.25)))
    drawn = page_charts.curves([page_charts.Series("a", points)], across="steps", up="%", logarithmic=True, height=100)
    assert numbers(drawn, "circle", "cx") == pytest.approx([0, 50, 100])
    assert numbers(drawn, "circle", "cy") == pytest.approx([10, 50, 75])
    assert 'aria-label="% over steps: a from 90.0 % at 1 to 25.0 % at 100"' in drawn
    two = [page_charts.Point(0.2, 0.3, 0.3, 0.3), page_charts.Point(0.6, 0.7, 0.7, 0.7)]
    drawn = page_charts.scatter(two, across="x", up="y", height=100)
    (left, right), (low, high) = numbers(drawn, "circle", "cx"), numbers(drawn, "circle", "cy")
    assert left < right
    assert low > high, "up is better"
    # One far below the others becomes an arrow, and they keep the scale.
    far = [*two, page_charts.Point(0.7, 0.8, 0.8, 0.8), page_charts.Point(0.5, 0.72, 0.72, 0.72)]
    far[0] = page_charts.Point(0.2, 0.0, 0.0, 0.0)
    drawn = page_charts.scatter(far, across="x", up="y")
    assert drawn.count("<circle") == 3
    assert "1 ↓ 0.0 %" in drawn


@pytest.mark.parametrize(
    ("gap", "place", "kind"),
    [((0.1, 0.05, 0.15), 75, "attack"), ((-0.1, -0.15, -0.05), 25, "worst"), ((0.0, -0.1, 0.1), 50, "clean")],
)
def test_differences_are_coloured_by_whether_they_are_clear(gap: Any, place: float, kind: str) -> None:
    drawn = page_charts.difference(*gap, 0.2)
    assert numbers(drawn, "circle", "cx") == [place]
    assert f'class="plot {kind}"' in drawn
    assert "◂" in page_charts.difference(-0.5, -0.6, -0.4, 0.2)
    assert "▸" in page_charts.difference(0.5, 0.4, 0.6, 0.2)


# ---------------------------------------------------------------- style


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme: str) -> None:
    colours = page_html.LIGHT if theme == "light" else page_html.DARK
    assert set(page_html.LIGHT) == set(page_html.DARK)
    for ground in ("ground", "raised"):
        for text in ("text", "muted", "link", "worst", "fail", "warn", "info", "pass", "none"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for mark in ("clean", "attack", "worst", *(f"series{k}" for k in range(page_html.SERIES))):
        assert contrast(colours[mark], colours["ground"]) >= 3, mark
    # The confusion table's text on its deepest colour.
    heat, ground = [int(p) for p in page_html.HEAT[theme].split()], colours["ground"]
    mixed = [round(0.5 * h + 0.5 * int(ground[1 + 2 * k : 3 + 2 * k], 16)) for k, h in enumerate(heat)]
    assert contrast(colours["text"], "#" + "".join(f"{part:02x}" for part in mixed)) >= 4.5
    assert f"--worst:{colours['worst']}" in page_html.style()


# ---------------------------------------------------------------- writing, the command


def test_a_page_is_written_whole_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    target.write_text("before")
    with pytest.raises(RecordError, match="cannot be read"):
        page.write_page(target, [tmp_path / "nothing.json"])
    assert target.read_text() == "before"
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="could not write"):
        page.write_page(tmp_path / "file" / "page.html", [folder])
    with pytest.raises(RecordError, match="needs a record"):
        page.write_page(target, [])
    with pytest.raises(RecordError, match="expected a list"):
        page.write_page(target, str(folder))
    (tmp_path / "record.json").write_text((folder / "record.json").read_text())
    (tmp_path / "record.npz").write_bytes(b"PK half of it")
    with pytest.raises(RecordError, match=r"record\.npz: not a whole file"):
        page.write_page(target, [tmp_path])
    assert target.read_text() == "before"


def test_the_same_record_gives_the_same_page(folder: Path, tmp_path: Path) -> None:
    assert written(tmp_path / "a.html", [folder]) == written(tmp_path / "b.html", [folder / "record.json"])


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    page.main([str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "record.html")
    page.main([str(folder), str(MEASURED[0])])
    assert "<title>2 evaluations compared</title>" in (tmp_path / "compare.html").read_text()
    page.main([str(folder / "record.json"), "-o", str(tmp_path / "deep" / "a.html")])
    assert (tmp_path / "deep" / "a.html").is_file()
    with pytest.raises(SystemExit, match=r"error: .*nothing: cannot be read"):
        page.main([str(tmp_path / "nothing")])


def test_the_command_runs_by_its_name(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mi_at.results.page", str(folder), "-o", "page.html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "page.html"
    assert json.loads((folder / "record.json").read_text())["key"] in (tmp_path / "page.html").read_text()
