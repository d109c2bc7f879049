"""python -m mi_at.plan: how far runs are, what they cost beside what they really cost, and what is refused."""

from __future__ import annotations

import csv
import fcntl
import functools
import os
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from mi_at import io, plan
from mi_at.results.flop import FlopCount
from mi_at.results.planning import GIB, OFFICIAL, Entry, Plan, Standing, render
from mi_at.results.records import run_key
from mi_at.results.rehearsal import Cost
from mi_at.results.runs import look
from mi_at.results.tables import TableError
from tests.own_table import search, write_table

CELLS = {"TRADES": ["defense=trades"], "CE": ["defense=ce"]}
SMALL = ["dataset=digits", "model=cnn_tiny", "evaluation=none", "attack.steps=2", "dataset.val_size=0"]
Planned = Callable[..., Plan]


def planning(place: Path, *typed: str, **options: Any) -> Plan:
    runs = place / "runs"
    return plan.plan([search(place), "table=own", "budget=smoke", f"runs={runs}", *typed], [runs], **options)


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """A table of two cells and two seeds, at budget smoke, in a folder of its own."""
    write_table(tmp_path, cells=CELLS, seeds=[0, 1], shared=SMALL)
    return functools.partial(planning, tmp_path)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """That table before any run, on a CPU core."""
    place = tmp_path_factory.mktemp("fresh")
    write_table(place, cells=CELLS, seeds=[0, 1], shared=SMALL)
    return planning(place, device="cpu_core")


def configuration(place: Path, *typed: str) -> dict[str, Any]:
    with io.composing():
        return io.compose_run([*SMALL, "budget=smoke", f"runs={place}/runs", *typed])


def states(made: Plan) -> list[str]:
    return [entry.standing.state for entry in made.entries]


def test_a_table_that_was_never_run(fresh: Plan) -> None:
    cells = [(entry.cell, entry.seed) for entry in fresh.entries]
    assert cells == [("TRADES", 0), ("CE", 0), ("TRADES", 1), ("CE", 1)]
    assert set(states(fresh)) == {"new"}
    trades, ce = fresh.entries[:2]
    assert trades.training is fresh.entries[2].training  # counted once for both seeds
    assert trades.training is not None
    assert ce.training is not None
    assert trades.training.step.total / ce.training.step.total == pytest.approx((2 * 2 + 7) / 3, rel=0.01)
    steps = trades.training.total.total - trades.training.readings.total
    assert steps == pytest.approx(2 * 4 * trades.training.step.total)  # 200 images in fifties
    text = render(fresh, "terminal")
    assert "never run x 2" in text
    assert text.splitlines()[0] == "own (budget smoke)"


def test_without_a_device_and_a_run_there_is_no_time(fresh: Plan) -> None:
    unknown = [replace(entry, speed=None) for entry in fresh.entries]
    assert unknown[0].hours is None
    assert "calibrate=true measures this machine" in render(Plan("", unknown, "this machine"), "terminal")


def test_states_on_disk(planned: Planned, tmp_path: Path) -> None:
    """As they are while a run lives and after it died; a lock goes with its holder."""
    config = configuration(tmp_path, "defense=ce")
    folder = look(config, key=run_key(config, config["choices"]), parent=tmp_path / "runs").folder

    def at() -> Entry:
        return planned("table.rows=[CE]", "seed=0").entries[0]

    folder.mkdir(parents=True)
    (folder / "last.ckpt").write_bytes(b"half of it")
    half = at()
    assert half.standing.state == "interrupted"
    assert half.share_to_train == 1.0  # of a damaged checkpoint nothing is known
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert at().standing.state == "running"
    os.close(handle)
    (folder / "trained.json").write_text("{}")
    trained = at()
    assert trained.standing.state == "trained"
    assert trained.share_to_train == 0.0
    assert trained.to_do == trained.evaluation > 0


def test_time_is_flop_by_speed(fresh: Plan) -> None:
    first = fresh.entries[0]
    assert first.training is not None
    assert first.hours == pytest.approx(first.training.total.total / (100e9 * 0.4) / 3600)
    assert first.evaluation_hours == pytest.approx(first.evaluation / (100e9 * 0.4) / 3600)
    whole, half = plan._named_device("h100", None), plan._named_device("h100", 0.125)
    assert whole.hours(Cost(fp32=1e18)) == pytest.approx(1e18 / (494e12 * 0.25) / 3600)
    assert whole.hours(Cost(bf16=1e18)) == pytest.approx(1e18 / (989e12 * 0.25) / 3600)
    assert half.hours(Cost(fp32=1e18)) == pytest.approx(2 * whole.hours(Cost(fp32=1e18)))
    small, large = Cost(fp32=1e12, calls=1e6), Cost(fp32=1e18, calls=1e6)
    assert whole.hours(small) == pytest.approx(30 / 3600), "it waits for a million operations"
    assert whole.hours(large) == whole.hours(Cost(fp32=1e18)), "it computes meanwhile"
    waiting = replace(first, speed=whole, evaluation=1e12, evaluation_calls=1e6)
    assert waiting.evaluation_hours == pytest.approx(30 / 3600)
    assert replace(waiting, evaluation_calls=1.0).evaluation_hours == pytest.approx(1e12 / (494e12 * 0.25) / 3600)


@pytest.mark.parametrize(
    ("typed", "options", "message"),
    [
        ([], {"device": "h10"}, "device=h10: expected one of h200, h100.*did you mean h100"),
        ([], {"device": "h100", "efficiency": 0.0}, r"efficiency=0.0: expected a share of the peak in \(0, 1\]"),
        ([], {"device": "h100", "calibrate": True}, "calibrate=true measures this machine, device=h100 is another"),
        (["table.rows=[CEE]"], {}, "table own has TRADES, CE; did you mean CE"),
        (["optim.epochz=2"], {}, "epochz"),
        (["defense.beta=-1", "table.rows=[TRADES]"], {}, "beta=-1"),
    ],
)
def test_refused(planned: Planned, typed: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises((TableError, ValueError), match=message):
        planned(*typed, **options)


@pytest.mark.parametrize("argument", ["format=pdf", "calibrate=maybe", "efficiency=0.3", "budget=smoke"])
def test_the_command_refuses(argument: str) -> None:
    table = [] if argument == "budget=smoke" else ["table=mimae_t8"]
    with pytest.raises(SystemExit, match=r"^error: .*(expected one of|expected true|of which device|which table)"):
        plan.main([*table, argument])


def test_missing_data_are_a_state(planned: Planned, tmp_path: Path) -> None:
    write_table(
        tmp_path, cells={"MNIST": ["defense=ce"]}, seeds=[0], shared=["dataset=mnist", "model=cnn4", "evaluation=none"]
    )
    made = planned("dataset.root=nowhere", "budget=paper")
    assert states(made) == ["no data"]
    training = made.entries[0].training
    assert training is not None
    assert training.size.images == OFFICIAL["mnist"][0] - 1000  # by the official number
    assert "data missing: MNIST" in render(made, "markdown")
    assert "nowhere" in made.entries[0].standing.why


def test_official_numbers() -> None:
    data = io.build_data(configuration(Path())["dataset"])
    data.setup("fit")
    train = len(data.train_index) + len(data.val_index)
    assert train == 200  # budget smoke
    data.setup("test")
    assert data.test_dataloader().num_images == OFFICIAL["digits"][1]


def test_csv_has_every_run_in_full(fresh: Plan) -> None:
    rows = list(csv.DictReader(StringIO(render(fresh, "csv"))))
    assert [row["seed"] for row in rows] == ["0", "0", "1", "1"]
    for row, entry in zip(rows, fresh.entries, strict=True):
        assert entry.training is not None
        assert float(row["flop_training"]) == entry.training.total.total
        assert float(row["flop_to_do_at_most"]) == entry.training.total.total + entry.evaluation
        assert float(row["memory_gib"]) * GIB == pytest.approx(entry.memory)


def test_a_table_fits_its_memory_or_says_so(fresh: Plan) -> None:
    assert "more than 90 %" not in render(fresh, "terminal")
    small = replace(fresh, memory=fresh.entries[0].memory)
    assert "memory: TRADES: more than 90 %" in render(small, "terminal")


def test_what_is_left_of_an_interrupted_run(fresh: Plan) -> None:
    entry = fresh.entries[0]
    assert entry.training is not None
    half = replace(entry, epochs=4, standing=Standing("interrupted", epoch=1))
    assert half.share_to_train == 0.75
    assert half.to_do == pytest.approx(0.75 * entry.training.total.total + entry.evaluation)
    assert "interrupted at epoch 1 of 4" in render(Plan("", [half], "here"), "terminal")


@pytest.mark.slow
def test_stages_are_lines_of_their_own_and_counted_once(planned: Planned, tmp_path: Path) -> None:
    write_table(
        tmp_path, cells={"A": ["defense=namid"], "B": ["defense=namid", "defense.alpha=2"]}, seeds=[0], shared=SMALL
    )
    assert [entry.cell for entry in planned().entries] == ["before: standard_at", "before: mi_estimators", "A", "B"]
    write_table(tmp_path, cells={"S": ["defense=standard_at"], "N": ["defense=namid"]}, seeds=[0], shared=SMALL)
    assert [entry.cell for entry in planned().entries] == ["S", "before: mi_estimators", "N"]  # its reference is a cell


def test_with_a_validation_split_stages_are_counted_too(planned: Planned, tmp_path: Path) -> None:
    """What tells one validation from another is the shapes of a state that holds more than tensors."""
    write_table(tmp_path, cells={"A": ["defense=namid", "dataset.val_size=40"]}, seeds=[0], shared=SMALL)
    stages = [entry.training for entry in planned().entries]
    assert len(stages) == 3
    assert all(stage is not None and stage.validation.total > 0 for stage in stages)


def test_one_training_in_several_cells_is_counted_once(planned: Planned, tmp_path: Path) -> None:
    """Two cells that differ in their evaluation."""
    cells = {"A": ["defense=ce"], "B": ["defense=ce", "select=last"]}
    write_table(tmp_path, cells=cells, seeds=[0], shared=SMALL)
    made = planned()
    first, again = made.entries
    assert (first.trains, again.trains) == (True, False)
    assert again.to_do == again.evaluation
    rows = render(made, "markdown").splitlines()
    total = next(row for row in rows if row.startswith("| all runs")).split(" | ")
    assert total[4] == next(row for row in rows if row.startswith("| A")).split(" | ")[4]


def test_a_remembered_speed(planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run of this machine says how fast it is, and where it is done."""
    from mi_at import train

    config = configuration(
        tmp_path,
        "evaluation=none",
        "defense=ce",
        "seed=0",
        "trainer.enable_progress_bar=false",
        "trainer.accelerator=cpu",
    )
    monkeypatch.chdir(tmp_path)
    train.run_once(config)
    made = planned("seed=0")
    assert states(made) == ["new", "done"]
    done = made.entries[1]
    assert done.standing.record is not None
    assert done.to_do == 0.0
    assert made.entries[0].speed is not None
    assert 1e6 < made.entries[0].speed.fp32 < 1e13
    assert "done: CE, seed 0" in render(made, "terminal")


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["defense=ncmi", "defense=ncmi_relaxed", "defense=trades callback=[awp,swa]"])
def test_the_count_is_that_of_a_real_smoke_run(cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 5 %, of the training and as a bound of the evaluation (issue: FLOP of a real smoke cell)."""
    compare([*cell.split(), "dataset=digits", "model=cnn_tiny"], tmp_path, monkeypatch)


def test_the_count_is_that_of_a_real_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(["defense=mimae", *SMALL], tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.realdata("mnist")
@pytest.mark.parametrize("defense", ["mimae", "ncmi"])
def test_the_count_is_that_of_a_real_smoke_run_on_mnist(
    defense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare([f"defense={defense}", "dataset=mnist", "model=cnn4"], tmp_path, monkeypatch)


def compare(typed: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mi_at import train

    parts: dict[str, int] = {}
    fit = train.fit

    def counted(*arguments: Any) -> Any:
        with FlopCount() as count:
            notes = fit(*arguments)
        parts["training"] = count.flop
        return notes

    monkeypatch.setattr(train, "fit", counted)
    monkeypatch.chdir(place)
    with io.composing():
        options = ["trainer.enable_progress_bar=false", "evaluation=chosen", "evaluation/attacks=[fgsm,pgd_20]"]
        config = io.compose_run([*typed, *options, "budget=smoke", "recipe=none", f"runs={place}/runs", "logger=none"])
        with FlopCount() as whole:
            train.run_once(config)
    estimate = plan._Estimate([])
    entry = estimate.entries("cell", config)[-1]
    assert entry.training is not None
    assert entry.training.total.total == pytest.approx(parts["training"], rel=0.05)
    assert 0 < whole.flop - parts["training"] <= 1.02 * entry.evaluation + parts["training"] * 0.02
