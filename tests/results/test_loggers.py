"""metrics.csv, Weights & Biases offline, TensorBoard: what a run leaves behind, read back."""

import builtins
import csv
import getpass
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.pgd import PGD
from mi_at.callbacks.checkpoints import Last
from mi_at.callbacks.probe import Probe
from mi_at.callbacks.sample_grid import SampleGrid
from mi_at.callbacks.speed import Speed
from mi_at.data.digits import Digits
from mi_at.defenses.trades import Trades
from mi_at.evaluation import evaluate
from mi_at.results import loggers, page_data
from mi_at.results.examples import write_examples
from mi_at.results.records import Record, make_record, write_record
from tests.callbacks import fits
from tests.results import pages

CONF = Path(__file__).resolve().parents[2] / "conf"
CONFIG = {"seed": 0, "defense": {"beta": 6.0}, "attack": {"eps": "8/255"}, "keep_epochs": [1, 2], "init_from": None}
ENVIRONMENT = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC")


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody is logged in, and nobody answers questions."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)

    def asked(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr(getpass, "getpass", asked)
    return home


def record() -> Record:
    """Of a network that is right now and then."""
    attacks = {"fgsm": FGSM(eps="8/255"), "pgd 2, ce": PGD(eps=0.1, step_size=0.05, steps=2)}
    result = evaluate(fits.module().net, attacks, fits.batches(2), progress=False)
    return make_record(result, config=CONFIG, checkpoint={"rule": "last"})


def callbacks(folder: Path, examples: Any) -> list[Callback]:
    """Everything that logs."""
    return [
        SampleGrid(folder),
        Speed(examples, every_n_steps=2),
        LearningRateMonitor("epoch"),
        Probe({"fgsm": FGSM(eps=0.1)}, folder=folder),
        Last(folder, every_n_steps=3),
    ]


# ---------------------------------------------------------------- metrics.csv


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def comparable(table: list[dict[str, str]]) -> list[dict[str, str]]:
    """Without times."""
    return [{name: value for name, value in row.items() if not name.startswith("speed/")} for row in table]


class Killed(Callback):
    """As after kill -9: nothing more is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.loggers.clear()
            raise RuntimeError("killed")


def test_csv_of_a_resumed_run_is_that_of_a_whole_one(tmp_path: Path) -> None:
    def run(folder: Path, *more: Callback, ckpt: Path | None = None) -> None:
        examples = fits.attack()
        fits.fit(
            folder,
            [*callbacks(folder, examples), *more],
            epochs=3,
            loggers=[loggers.csv(folder=folder)],
            ckpt=ckpt,
            examples=examples,
            defense=fits.module(classes=10, epochs=3),
            data=Digits(batch_size=8, train_size=32, val_size=20),
        )

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole)
    for step in (6, 10):  # after its checkpoint at step 3; then after those of step 8 and 9
        with pytest.raises(RuntimeError, match="killed"):
            run(parts, Killed(step), ckpt=parts / "last.ckpt" if step > 6 else None)
        assert int(rows(parts)[-1]["step"]) >= step - 2
    run(parts, ckpt=parts / "last.ckpt")
    assert comparable(rows(parts)) == comparable(rows(whole))
    steps = [int(row["step"]) for row in rows(whole)]
    assert steps == sorted(set(steps)), "a row per step"
    last = rows(whole)[-1]
    for name in ("epoch", "train/loss", "train/ce", "val/clean", "val/robust", "train/robust", "probe/fgsm"):
        assert last[name] != "", name
    assert {"lr-SGD", "speed/attack_share", "speed/images_per_second"} <= set(last)


def test_csv_rows_and_columns(tmp_path: Path) -> None:
    logger = loggers.csv(folder=tmp_path / "new")
    path = tmp_path / "new" / "metrics.csv"
    logger.log_metrics({"b": 0.1, "epoch": 0}, 1)
    assert path.read_text() == "epoch,step,b\n0,1,0.1\n", "on disk at once"
    logger.log_metrics({"a": torch.tensor(2.0)}, 1)
    logger.log_metrics({"a": 1 / 3}, 2)
    logger.log_metrics({"b": 123456.0}, 2)
    logger.log_metrics({"b": 1.0, "epoch": 1}, 2)
    assert path.read_text() == "epoch,step,a,b\n0,1,2,0.1\n1,2,0.333333333,1\n"
    logger.log_metrics({"test/pgd": 50.0})
    assert rows(path.parent)[-1]["test/pgd"] == "50", "without a step: where the logger stands"
    path.rename(tmp_path / "taken.csv")
    logger.log_metrics({"test/pgd": 50.0})
    assert [row["test/pgd"] for row in rows(path.parent)] == ["50"], "who takes the file away stops nothing"
    (tmp_path / "taken.csv").rename(path)
    again = loggers.csv(folder=tmp_path / "new")
    again.log_metrics({"test/fgsm": 60.0})
    assert [row["test/fgsm"] for row in rows(path.parent)] == ["", "60"]
    assert [row["test/pgd"] for row in rows(path.parent)] == ["", "50"]


def test_csv_forgets_a_torn_line_and_steps_taken_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,a\n0,1,0.5\n0,3,0.25\n0,5,0.1")
    logger = loggers.csv(folder=tmp_path)
    logger.log_metrics({"a": 7.0, "b": 1.0}, 3)
    assert rows(tmp_path) == [
        {"epoch": "0", "step": "1", "a": "0.5", "b": ""},
        {"epoch": "", "step": "3", "a": "7", "b": "1"},
    ]
    loggers.csv(folder=tmp_path).log_metrics({"a": 0.0}, 0)
    assert rows(tmp_path) == [{"epoch": "", "step": "0", "a": "0"}]


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    made = [
        loggers.csv(folder=tmp_path),
        loggers.wandb(folder=tmp_path, key="k", config_hash="h", project="p", mode="offline"),
        loggers.tensorboard(folder=tmp_path),
    ]
    for logger in made:
        logger.log_metrics({"a": 1.0}, 1)
    made[1].experiment.log({"a": 1})
    loggers.log_evaluation(made, record())
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


# ---------------------------------------------------------------- W&B


def stored(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a LevelDB log (blocks of 32 KiB) after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, block, header = path.read_bytes(), 32768, 7
    assert data[:4] == b":W&B"
    place, parts = header, b""
    while place + header <= len(data):
        if block - place % block < header:
            place += block - place % block
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + header])
        parts += data[place + header : place + header + size]
        place += header + size
        if kind in (1, 4):  # whole, or the last part
            found = wandb_internal_pb2.Record()
            found.ParseFromString(parts)
            parts = b""
            yield found


def nested(entries: Any) -> dict[str, Any]:
    """What was logged at once; a picture or table is a dictionary."""
    found: dict[str, Any] = {}
    for entry in entries:
        *outer, name = entry.nested_key or [entry.key]
        place = found
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = json.loads(entry.value_json)
    return found


class Run:
    """An offline run, read back."""

    def __init__(self, folder: Path) -> None:
        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.finished: int | None = None
        (path,) = folder.glob("*.wandb")
        self.files = folder / "files"
        for item in stored(path):
            kind = item.WhichOneof("record_type")
            if kind == "run":
                self.run = item.run
                self._configure(item.run.config)
            elif kind == "config":
                self._configure(item.config)
            elif kind == "history":
                self.history.append(nested(item.history.item))
            elif kind == "exit":
                self.finished = item.exit.exit_code

    def _configure(self, config: Any) -> None:
        self.config |= {entry.key: json.loads(entry.value_json) for entry in config.update}

    def of(self, name: str) -> list[Any]:
        return [line[name] for line in self.history if name in line]


def offline_runs(folder: Path) -> list[Run]:
    return [Run(path) for path in sorted(folder.glob("wandb/offline-run-*"))]


def test_an_offline_run_holds_metrics_images_table_and_config(
    tmp_path: Path, nobody: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, examples = tmp_path / "run", fits.attack()
    makers = {
        "csv": loggers.csv,
        "wandb": instantiate({"_target_": "mi_at.results.loggers.wandb", "project": "mi_at"}, _partial_=True),
    }
    made = loggers.build(
        makers,
        folder=folder,
        key="trades-random-linear-s0",
        config_hash="0a1b2c3d",
        tags=["paper 004", "table 8"],
        group="a sweep",
        config=CONFIG,
    )
    defense = fits.module(defense=Trades(beta=6.0))
    trainer = fits.fit(folder, callbacks(folder, examples), epochs=2, loggers=made, defense=defense, examples=examples)
    wanted = record()
    place = made[1].place
    loggers.log_evaluation(made, wanted, step=trainer.global_step)
    loggers.finish(made)

    (run,) = offline_runs(folder)
    assert run.run.project == "mi_at"
    assert run.run.display_name == "trades-random-linear-s0"
    assert run.run.run_id == loggers.run_id("trades-random-linear-s0", "0a1b2c3d")
    assert list(run.run.tags) == ["paper 004", "table 8"]
    assert run.run.run_group == "a sweep"
    assert {name: run.config[name] for name in CONFIG} == CONFIG
    assert run.finished == 0, "the file is complete"
    assert place == f"wandb sync {run.files.parent}"

    for name in ("train/loss", "train/ce", "train/kl", "lr-SGD", "train/clean", "train/robust", "val/clean"):
        assert run.of(name), name
    for name in ("val/cross_entropy", "val/margin", "val/robust", "probe/fgsm", "speed/attack_share"):
        assert run.of(name), name
    assert len(run.of("val/robust")) == 2
    assert [float(row["val/robust"]) for row in rows(folder) if row.get("val/robust")] == pytest.approx(
        run.of("val/robust")
    )
    assert all(value > 0 for value in run.of("speed/images_per_second"))
    assert max(run.of("trainer/global_step")) == 8

    pictures = run.of("samples")
    assert len(pictures) == 2
    size = Image.open(run.files / pictures[-1]["filenames"][0]).size
    assert size == Image.open(folder / "samples.png").size

    (reference,) = run.of("evaluation")
    table = json.loads((run.files / reference["path"]).read_text())
    assert table["columns"] == ["attack", "norm", "eps", "steps", "n", "accuracy", "flags", "audit"]
    by_name = {row[0]: row for row in table["data"]}
    assert by_name["clean"][1:5] == [None, None, None, 12]
    assert by_name["fgsm"][1] == "linf"
    assert by_name["fgsm"][2] == pytest.approx(8 / 255)
    assert by_name["pgd 2, ce"][3] == 2
    for row in wanted.attacks:
        assert by_name[row.name][5] == pytest.approx(100 * row.accuracy)
        assert by_name[row.name][6] == " ".join(row.flags)
    assert run.of("test/fgsm") == [pytest.approx(100 * wanted["fgsm"].accuracy)]
    assert run.of("test/pgd_2_ce"), "without what W&B has no place for in a name"
    assert float(rows(folder)[-1]["test/clean"]) == pytest.approx(100 * wanted["clean"].accuracy)

    assert not (nobody / ".local").exists(), "its files are in the run folder"
    assert list(folder.glob("wandb/artifacts/staging/*"))
    printed = capfd.readouterr()
    assert "wandb" not in printed.out + printed.err, "it is silent"


def test_all_that_a_page_shows_goes_to_wandb_too(tmp_path: Path, nobody: Path) -> None:
    result = pages.evaluation()
    wanted = pages.record(result, audit=pages.AUDIT)
    known = pages.examples(result)
    path = write_record(tmp_path / "evaluated" / "record.json", pages.record(result), result)
    write_examples(path.with_name("examples.npz"), {**known, "pgd 5, ce": known["fgsm"]})
    made = [loggers.wandb(folder=tmp_path / "run", key="k", config_hash="h", project="p")]
    loggers.log_evaluation(made, wanted, step=4, path=path)
    (run,) = offline_runs(tmp_path / "run")

    def table(name: str) -> tuple[list[str], list[list[Any]]]:
        (reference,) = run.of(name)
        stored = json.loads((run.files / reference["path"]).read_text())
        return stored["columns"], stored["data"]

    columns, data = table("evaluation")
    assert {row[columns.index("audit")] for row in data} == {"fail"}

    columns, data = table("evaluation/audit")
    assert columns == ["check", "severity", "measured", "threshold", "meaning", "todo"]
    assert [row[1] for row in data] == ["fail", "warn", "not checked", "pass"]
    assert data[0] == ["unbounded", "fail", "0.25", "0.01", "masked", "adapt"]

    columns, data = table("evaluation/classes")
    assert columns == ["class", "n", "clean", "robust", "attack"]
    row = page_data.for_counts(wanted)
    assert row is not None
    assert sum(n for _, n, *_ in data) == row.n
    assert sum(n * robust / 100 for _, n, _, robust, _ in data) == pytest.approx(row.correct)
    assert sum(n * clean / 100 for _, n, clean, *_ in data) == pytest.approx(wanted["clean"].correct)

    for over, places in (("eps", [0, 0.05, 0.1, 0.2]), ("steps", [1, 5, 10])):
        columns, data = table(f"evaluation/over_{over}_table")
        assert columns == [over, "accuracy", "curve"]
        assert [x for x, *_ in data] == pytest.approx(places)
        assert data[1][1] == pytest.approx(100 * wanted["pgd_5"].accuracy)

    for name, examples in (("fgsm", known["fgsm"]), ("pgd_5", known["pgd_5"]), ("pgd_5_ce", known["fgsm"])):
        (pictures,) = run.of(f"evaluation/examples/{name}")
        assert len(pictures["filenames"]) == len(examples.label) == 3
        assert pictures["captions"][1] == "image 5: 1, under attack 2, 75.0 % sure; difference x 10"
        with Image.open(run.files / pictures["filenames"][1]) as shown:
            pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1)[:1, ::7]
        for place, image in enumerate((examples.x[1], examples.x_adv[1])):
            left = place * (56 + 4)
            assert torch.equal(pixels[:, :, left : left + 56 : 7], (image * 255).round().to(torch.uint8))
    assert not (nobody / ".local").exists(), "its files are in the run folder"


def test_without_outcomes_examples_or_audit_there_is_the_table_alone(tmp_path: Path) -> None:
    path = write_record(tmp_path / "evaluated" / "record.json", record())
    made = [loggers.wandb(folder=tmp_path / "run", key="k", config_hash="h", project="p")]
    loggers.log_evaluation(made, record(), step=4, path=path)
    (run,) = offline_runs(tmp_path / "run")
    assert {name for line in run.history for name in line if name.startswith("evaluation")} == {"evaluation"}
    columns = json.loads((run.files / run.of("evaluation")[0]["path"]).read_text())
    assert {row[-1] for row in columns["data"]} == {"-"}


def test_a_resumed_run_goes_on_under_its_id(tmp_path: Path) -> None:
    for step in (1, 2):
        logger = loggers.wandb(folder=tmp_path, key="k", config_hash="h", project="p")
        logger.log_metrics({"a": 1.0}, step)
        loggers.finish([logger])
    first, second = offline_runs(tmp_path)
    assert first.run.run_id == second.run.run_id
    assert [run.of("trainer/global_step") for run in (first, second)] == [[1], [2]]


def test_run_ids() -> None:
    ids = {loggers.run_id(key, hash_) for key in ("a", "b", "a b/c" * 40) for hash_ in ("0", "1")}
    assert len(ids) == 6
    assert all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)


def test_a_failed_fit_ends_the_run(tmp_path: Path) -> None:
    logger = loggers.wandb(folder=tmp_path, key="k", config_hash="h", project="p")
    with pytest.raises(RuntimeError, match="killed"):
        fits.fit(tmp_path, [Fails()], epochs=1, loggers=[logger])
    (run,) = offline_runs(tmp_path)
    assert run.finished == 1
    assert logger.place == ""


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit(143)])
def test_a_failed_evaluation_ends_the_run(tmp_path: Path, error: BaseException) -> None:
    """A fit leaves the run open, for the evaluation's results."""
    logger = loggers.wandb(folder=tmp_path, key="k", config_hash="h", project="p")
    with loggers.ended_on_failure([logger]):
        fits.fit(tmp_path, [], epochs=1, loggers=[logger])
    assert logger.place, "open"
    with pytest.raises(type(error)) as caught, loggers.ended_on_failure([logger]):
        raise error
    assert caught.value is error
    (run,) = offline_runs(tmp_path)
    assert run.finished == 1
    assert logger.place == ""


def test_what_failed_first_is_what_is_told() -> None:
    class Broken(loggers.MetricsFile):
        def finalize(self, status: str) -> None:
            raise OSError(f"no space left to say {status}")

    with pytest.raises(ValueError, match="the evaluation"), loggers.ended_on_failure([Broken("nowhere")]):
        raise ValueError("the evaluation")


class Fails(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise RuntimeError("killed")


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    logger = loggers.wandb(folder=tmp_path / "run", key="k", config_hash="h", project="p", mode="disabled")
    logger.log_metrics({"a": 1.0}, 1)
    loggers.finish([logger])
    assert list(tmp_path.rglob("*.wandb")) == []


def mode(asked: str) -> str:
    made: Any = loggers.wandb(folder="run", key="k", config_hash="h", project="p", mode=asked)
    return str(made._wandb_init["mode"])


def test_auto_is_offline_without_a_login(nobody: Path) -> None:
    assert mode("auto") == "offline"
    (nobody / ".netrc").write_text("machine example.org login me password " + "0" * 40 + "\n")
    assert mode("auto") == "offline"


@pytest.mark.parametrize("place", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", ".netrc", "_netrc"])
def test_auto_is_online_with_a_login(place: str, nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "netrc" in place.lower():
        path = nobody / (place if place != "NETRC" else "elsewhere")
        path.write_text("machine api.wandb.ai login me password " + "0" * 40 + "\n")
        path.chmod(0o600)
    if place.isupper():
        monkeypatch.setenv(place, str(nobody / "elsewhere") if place == "NETRC" else "0" * 40)
    assert mode("auto") == "online"
    assert mode("online") == "online"
    assert mode("offline") == "offline"


@pytest.mark.parametrize(("given", "wanted"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")])
def test_the_environment_wins_over_auto(given: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", given)
    assert mode("auto") == wanted
    assert mode("online") == "online", "what the configuration says wins over the environment"


def test_bad_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"mode='cloud': expected one of auto, online, offline, disabled"):
        mode("cloud")
    with pytest.raises(ValueError, match=r"logger\.wandb\.mode=online: nobody is logged in .*wandb login"):
        mode("online")
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ValueError, match="WANDB_MODE=online: nobody is logged in"):
        mode("auto")
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(ValueError, match="WANDB_MODE=sometimes: expected online, offline or disabled"):
        mode("auto")


def test_a_project_that_wandb_refuses_is_named(tmp_path: Path) -> None:
    logger = loggers.wandb(folder=tmp_path, key="k", config_hash="h", project="a/b")
    with pytest.raises(ValueError, match=r"logger\.wandb: W&B refuses the run: .*project.*a/b"):
        logger.log_metrics({"a": 1.0}, 1)


def test_an_unreachable_service_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    really, modes = wandb.init, []

    def init(**options: Any) -> Any:
        modes.append(options["mode"])
        assert options["settings"].init_timeout <= 60
        assert options["settings"].finish_timeout > 0
        if options["mode"] == "online":
            raise wandb.errors.CommError("no route to host\nand more")
        return really(**options)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    logger = loggers.wandb(folder=tmp_path, key="k", config_hash="h", project="p")
    with pytest.warns(UserWarning, match=r"\(no route to host\); it is recorded offline, .*wandb sync"):
        logger.log_metrics({"a": 1.0}, 1)
    loggers.finish([logger])
    assert modes == ["online", "offline"]
    assert offline_runs(tmp_path)[0].of("a") == [1.0]

    asked = loggers.wandb(folder=tmp_path, key="k", config_hash="h", project="p", mode="online")
    with pytest.raises(ConnectionError, match=r"mode=online: .*no route to host.*mode=offline"):
        asked.log_metrics({"a": 1.0}, 1)


# A real attempt: W&B's own service waits until its time is up.
@pytest.mark.slow
def test_nothing_listens(tmp_path: Path) -> None:
    code = f"""
from mi_at.results import loggers
loggers.INIT_TIMEOUT = 5
logger = loggers.wandb(folder={str(tmp_path)!r}, key="k", config_hash="h", project="p")
logger.log_metrics({{"a": 1.0}}, 1)
loggers.finish([logger])
"""
    environment = {**os.environ, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "it is recorded offline" in done.stderr
    assert [run.of("a") for run in offline_runs(tmp_path)] == [[1.0]]


# ---------------------------------------------------------------- TensorBoard, makers, configuration


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    examples = fits.attack()
    made = [loggers.tensorboard(folder=tmp_path)]
    fits.fit(tmp_path, callbacks(tmp_path, examples), epochs=2, loggers=made, examples=examples)
    loggers.log_evaluation(made, record(), step=8)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/loss", "val/robust", "lr-SGD", "test/clean"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["samples"]
    assert events.Scalars("test/clean")[0].step == 8


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)], ids=["missing", "a folder of that name"])
def test_a_missing_package_is_named(package: str, found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    makers: dict[str, Callable[..., Any]] = {
        "wandb": lambda: loggers.wandb(folder="run", key="k", config_hash="h", project="p"),
        "tensorboard": lambda: loggers.tensorboard(folder="run"),
    }
    with pytest.raises(ImportError, match=rf"logger={package} needs the package {package}: pip install '.*{package}"):
        makers[package]()


def test_wandb_and_tensorboard_are_imported_by_their_loggers_alone() -> None:
    missing = "import sys; sys.modules['wandb'] = sys.modules['tensorboard'] = None"
    code = (
        f"{missing}; import mi_at.callbacks.sample_grid; from mi_at.results import loggers; loggers.csv(folder='run')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("choice", "kinds"),
    [
        ("none", []),
        ("csv", ["MetricsFile"]),
        ("wandb", ["MetricsFile", "WandbRun"]),
        ("tensorboard", ["MetricsFile", "TensorBoardLogger"]),
        ("[wandb,tensorboard]", ["MetricsFile", "WandbRun", "TensorBoardLogger"]),
    ],
)
def test_configurations(choice: str, kinds: list[str], tmp_path: Path) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        nodes = hydra_compose(None, overrides=[f"+logger={choice}"]).get("logger", {})
    makers = {name: instantiate(node, _partial_=True) for name, node in nodes.items()}
    made = loggers.build(makers, folder=tmp_path, key="k", config_hash="h", config=CONFIG)
    assert [type(logger).__name__ for logger in made] == kinds
