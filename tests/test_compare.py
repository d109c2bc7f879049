"""python -m mi_at.compare: two runs or sets of seeds, and what may not be compared."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mi_at.compare import main, report
from mi_at.results.pairing import ComparisonError, compare, differences, read_side, term_shares
from mi_at.results.records import read_outcomes, write_record
from tests.results.makers import config, evaluation, leaving, record

ROOT = Path(__file__).resolve().parents[1] / "results" / "measured"
MNIST = ROOT / "head_to_head_mnist_cnn4_short"


def run(folder: Path, *, seed: int = 0, eps: float = 0.02, less: int = 0, **options: Any) -> Path:
    """A run folder with a record of its own, in which FGSM leaves `less` images fewer right than it does."""
    result = evaluation(eps=eps)
    result = leaving(result, "fgsm", int(result["fgsm"].correct.sum()) - less)
    write_record(folder / "record.json", record(result, seed=seed, **options), result)
    return folder


def test_two_measured_networks(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(MNIST / "standard_at/seed0"), str(MNIST / "mimae/seed0")])
    printed = capsys.readouterr().out
    assert "A: standard_at-mnist-cnn4" in printed
    assert "defense.lambda_mi" in printed
    assert "not that the methods do" in printed
    for part in ("evaluation, hours", "training, hours", "share of the loss", "at matched clean accuracy"):
        assert part in printed
    assert "linf, eps 0.3, 20 steps of 0.03, cross entropy" in printed
    assert "linf, eps 0.3, worst of fgsm, pgd_20, adaptive\n" in printed
    assert "same records" not in printed
    rows, apart = compare(read_side(MNIST / "standard_at/seed0"), read_side(MNIST / "mimae/seed0"))
    assert apart == []
    pgd = next(row for row in rows if row.name == "pgd_20")
    outcomes = [read_outcomes(MNIST / name / "seed0/record.npz") for name in ("standard_at", "mimae")]
    right = [found["pgd_20.prediction"] == found["label"] for found in outcomes]
    assert (pgd.a, pgd.b) == pytest.approx([share.mean() for share in right])
    assert pgd.difference.value == pytest.approx(right[1].mean() - right[0].mean())
    assert pgd.n == 10_000
    clean = [found["clean.prediction"] == found["label"] for found in outcomes]
    both = clean[0] & clean[1]
    assert pgd.both_clean == pytest.approx((right[0][both].mean(), right[1][both].mean(), both.sum()))
    assert pgd.matched is not None
    assert pgd.matched.value == pytest.approx(right[1][both].mean() - right[0][both].mean())
    assert pgd.matched.n == both.sum()
    assert pgd.matched.value != pytest.approx(pgd.difference.value, abs=1e-6)
    union = next(row for row in rows if row.name == "worst of 7 (n 200)")
    assert union.a == pytest.approx(0.91)


def test_a_network_with_itself_has_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(MNIST / "mart/seed0"), str(MNIST / "mart/seed0"), "--markdown"])
    printed = capsys.readouterr().out
    assert "| pgd_20 | 10000 |" in printed
    assert "is better" not in printed
    assert "What differs" not in printed
    assert "A and B are the same records" in printed


def test_seeds_are_paired(tmp_path: Path) -> None:
    for side, shift in (("a", 0.0), ("b", 0.01)):
        for seed in (0, 1, 2):
            run(tmp_path / side / f"s{seed}", seed=seed, eps=0.02 + shift, config=config(seed=seed, optim__lr=shift))
    a, b = read_side(tmp_path / "a"), read_side(tmp_path / "b")
    assert a.seeds == (0, 1, 2)
    rows, apart = compare(a, b)
    assert [row.name for row in rows] == ["clean"]
    assert rows[0].difference.n == 3
    assert any("fgsm: eps 0.02 and 0.03" in sentence for sentence in apart)


def test_another_attack_under_the_same_name_is_not_compared(tmp_path: Path) -> None:
    """Nor a worst case over it; what an older record does not know of its attacks keeps nobody apart."""
    sides = {}
    for name, described in (("a", {}), ("b", {"restarts": 10, "objective": "margin"}), ("old", None)):
        side = read_side(run(tmp_path / name))
        made = side.records[0]
        rows = [
            replace(row, description={} if described is None else {**row.description, "restarts": 1, **described})
            if row.name == "pgd_20"
            else row
            for row in made.attacks
        ]
        sides[name] = replace(side, records=(replace(made, attacks=tuple(rows)),))
    rows, apart = compare(sides["a"], sides["b"])
    assert [row.name for row in rows] == ["clean", "fgsm"]
    assert any(sentence.startswith("pgd_20: ") and "restarts 1 and 10" in sentence for sentence in apart)
    assert "worst of fgsm, pgd_20: pgd_20 is not the same attack on both" in apart
    assert compare(sides["a"], sides["old"])[1] == compare(sides["a"], sides["a"])[1] == []


def test_matched_clean_accuracy_over_seeds(tmp_path: Path) -> None:
    """Every fifth of the 40 images has another label: it is right on neither side when clean, and does not count."""
    for side, lost in (("a", 0), ("b", 3)):
        for seed in (0, 1):
            run(tmp_path / side / f"s{seed}", seed=seed, less=lost + seed * (side == "b"))
    rows, _ = compare(read_side(tmp_path / "a"), read_side(tmp_path / "b"))
    fgsm = next(row for row in rows if row.name == "fgsm")
    assert fgsm.both_clean is not None
    assert fgsm.both_clean[2] == 32
    assert fgsm.matched is not None
    assert fgsm.matched.value == pytest.approx(-3.5 / 32)
    assert fgsm.difference.value == pytest.approx(-3.5 / 40)
    assert fgsm.matched.n == 2
    assert next(row for row in rows if row.name == "clean").matched is None


def test_the_seeds_of_a_sweep_are_one_configuration(tmp_path: Path) -> None:
    """Where the data set takes the seed of the run, as every one of conf/ does."""
    for side, rate in (("a", 0.1), ("b", 0.5)):
        for seed in (0, 1):
            sweep = config(seed=seed, dataset__seed=seed, optim__lr=rate)
            run(tmp_path / side / f"s{seed}", seed=seed, less=seed * (side == "b"), config=sweep)
    a, b = read_side(tmp_path / "a"), read_side(tmp_path / "b")
    assert (a.seeds, b.seeds) == ((0, 1), (0, 1))
    text = report(a, b)
    assert "over 2 seeds (paired t" in text
    assert [line.split() for line in text.splitlines() if line.startswith(("optim", "dataset", "seed "))] == [
        ["optim.lr", "0.1", "0.5"]
    ]


def test_what_differs_and_the_terms(tmp_path: Path) -> None:
    notes = {"terms": {"share/mi": {"mean": 0.25}, "gradient/mi": {"mean": 0.5}, "share/ce": {"mean": 0.75}}}
    one = read_side(run(tmp_path / "one")).records[0]
    two = read_side(run(tmp_path / "two", config=config(optim__lr=0.5), training=notes)).records[0]
    assert differences(one, two) == [("optim.lr", 0.1, 0.5)]
    assert term_shares([one]) == {}
    assert term_shares([two]) == {"mi": (0.25, 0.5), "ce": (0.75, None)}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"config": config(budget="smoke")}, "budget: short and smoke"),
        ({"names": {"defense": "ce", "dataset": "mnist"}}, "dataset: digits and mnist"),
    ],
)
def test_only_like_is_compared(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    a, b = read_side(run(tmp_path / "a")), read_side(run(tmp_path / "b", **other))
    with pytest.raises(ComparisonError, match=message):
        compare(a, b)


def test_seeds_must_be_the_same(tmp_path: Path) -> None:
    for seed in (0, 1):
        run(tmp_path / "a" / f"s{seed}", seed=seed)
    a, b = read_side(tmp_path / "a"), read_side(run(tmp_path / "b", seed=0))
    with pytest.raises(ComparisonError, match=r"seeds: \(0, 1\) and \(0,\)"):
        compare(a, b)


def test_seeds_are_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1, 2):
        run(tmp_path / "a" / f"s{seed}", seed=seed)
        if seed < 2:
            run(tmp_path / "b" / f"s{seed}", seed=seed, less=2)
    sides = str(tmp_path / "a"), str(tmp_path / "b")
    with pytest.raises(SystemExit, match=r"--seeds 0,1 compares those that both have"):
        main([*sides])
    main([*sides, "--seeds", "0,1"])
    assert "over 2 seeds" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"b: no run of seed 2: it has 0, 1"):
        main([*sides, "--seeds", "2"])
    with pytest.raises(SystemExit, match=r"--seeds x: expected whole numbers"):
        main([*sides, "--seeds", "x"])


def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*no record.json there"):
        main([str(tmp_path), str(MNIST / "ce")])
    for method in ("ce", "mart"):
        shutil.copytree(MNIST / method / "seed0", tmp_path / "several" / method)
    with pytest.raises(SystemExit, match=r"error: .*holds several configurations"):
        main([str(tmp_path / "several"), str(MNIST / "ce")])
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(SystemExit, match=r"error: .*not a whole record"):
        main([str(tmp_path), str(MNIST / "ce")])
    for name in ("a", "b"):
        run(tmp_path / "twice" / name)
    with pytest.raises(ComparisonError, match="several runs of one seed"):
        read_side(tmp_path / "twice")


def test_outcomes_without_an_attack_are_named(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
    outcomes = {name: values for name, values in read_outcomes(folder / "record.npz").items() if "fgsm" not in name}
    np.savez(folder / "record.npz", **outcomes)
    side = read_side(folder)
    with pytest.raises(ComparisonError, match="the outcomes lack fgsm"):
        compare(side, side)
