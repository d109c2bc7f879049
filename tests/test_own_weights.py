"""A network that was trained elsewhere, from its state dict: one command, and three lines of Python."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import mi_at
from mi_at import io
from mi_at.evaluate import robustness
from mi_at.results.page_evaluation import command as command_of
from mi_at.results.records import Record, read_record
from tests.commands import Done, command

PACKAGE = '''
"""A user's network: plain PyTorch, normalisation inside."""
import torch
from torch import nn


class Normalised(nn.Module):
    def forward(self, x):
        return (x - 0.3) / 0.38


class Net(nn.Module):
    def __init__(self, num_classes=10, hidden=24):
        super().__init__()
        self.layers = nn.Sequential(
            Normalised(), nn.Flatten(), nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.1),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x):
        return self.layers(x)


class NoGradient(Net):
    """Tells nobody where its loss grows."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Broken(Net):
    """Fails."""

    def forward(self, x):
        raise ValueError("my own mistake")


class Probabilities(Net):
    """Ends with a softmax, which is no logit."""

    def forward(self, x):
        return super().forward(x).softmax(dim=1)
'''

SCRIPT = """
import sys
import torch
from sklearn.datasets import load_digits
from their_package import Net

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
y = torch.tensor(digits.target)
net = Net()
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
for epoch in range(20):
    for batch in torch.randperm(len(y)).split(128):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
torch.save(net.state_dict(), "weights.pt")
assert not any(name.split(".")[0] == "mi_at" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package, and weights that a script trained which knows nothing of mi_at."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "their_package").mkdir()
    (folder / "their_package/__init__.py").write_text(PACKAGE)
    (folder / "train.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def weights(theirs: Path) -> dict[str, Tensor]:
    return dict(torch.load(theirs / "weights.pt", weights_only=True))


def evaluate(folder: Path, *overrides: str) -> Done:
    return command(folder, *overrides, module="mi_at.evaluate")


OWN = ("model._target_=their_package.Net", "dataset=digits")
SHORT = ("evaluation.n=30", "evaluation.n_of.autoattack=4", "evaluation.attacks.autoattack.queries=20")


def record_of(done: Done, folder: Path) -> Record:
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("  record ")]
    return read_record(folder / line.split()[1])


# ---------------------------------------------------------------- the command
def test_one_command_evaluates_it(theirs: Path) -> None:
    options = ("evaluation=standard", *SHORT, "evaluation.attacks.pgd_50x10.restarts=2", "evaluation.audit=false")
    done = evaluate(theirs, "checkpoint=weights.pt", *OWN, *options)
    record = record_of(done, theirs)
    assert record["clean"].accuracy > 0.9
    assert record["pgd_50x10"].accuracy < record["clean"].accuracy
    assert (record["clean"].n, record["autoattack"].n) == (30, 4)
    assert record.key == "weights-digits-net"
    assert record.names["evaluation"] == "standard"
    assert record.checkpoint["rule"] == "file"
    assert record.checkpoint["name"] == "weights.pt"
    assert record.config["model"]["_target_"] == "their_package.Net"
    assert "defense" not in record.config
    assert record.config["weights"] == record.checkpoint["weights"]
    assert "trained elsewhere" in done.out


def test_the_page_has_the_command_that_repeats_it(theirs: Path, tmp_path: Path) -> None:
    options = ("evaluation=chosen", "evaluation/attacks=[fgsm]", "evaluation.n=12", "evaluation.eps=0.1")
    first = evaluate(theirs, "checkpoint=weights.pt", *OWN, *options, f"output={tmp_path}", "device=cpu")
    record = record_of(first, theirs)
    said = command_of(record)
    assert said == "python -m mi_at.evaluate " + shlex.join(["checkpoint=weights.pt", *OWN, *options])
    again = record_of(evaluate(theirs, *shlex.split(said)[3:], f"output={tmp_path}/again"), theirs)
    assert again.config_hash == record.config_hash
    assert again["fgsm"].correct == record["fgsm"].correct


def test_a_finished_evaluation_is_found_again(theirs: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    options = (*OWN, "evaluation=none", "evaluation.n=7", f"output={tmp_path}")
    first = record_of(evaluate(theirs, "checkpoint=weights.pt", *options), theirs)
    found = evaluate(theirs, "checkpoint=weights.pt", *options)
    assert "again=true attacks anew" in found.out
    assert record_of(found, theirs) == first
    anew = evaluate(theirs, "checkpoint=weights.pt", *options, "again=true")
    assert "attacks anew" not in anew.out
    assert record_of(anew, theirs).date >= first.date
    (path,) = tmp_path.glob("*/record.json")
    path.write_text(path.read_text()[:50])
    assert (
        record_of(evaluate(theirs, "checkpoint=weights.pt", *options), theirs)["clean"].correct
        == first["clean"].correct
    )


def test_a_finished_evaluation_of_an_edited_network_is_none(theirs: Path, tmp_path: Path) -> None:
    """The class is another, though its name and its weights are as before."""
    shutil.copytree(theirs, tmp_path, dirs_exist_ok=True)
    options = (*OWN, "evaluation=chosen", "evaluation/attacks=[fgsm]", "evaluation.n=40", "evaluation.eps=0.05")
    first = record_of(evaluate(tmp_path, "checkpoint=weights.pt", *options), tmp_path)
    package = tmp_path / "their_package/__init__.py"
    package.write_text(package.read_text().replace("return self.layers(x)", "return self.layers(x.detach())"))
    edited = evaluate(tmp_path, "checkpoint=weights.pt", *options)
    assert "attacks anew" not in edited.out
    record = record_of(edited, tmp_path)
    assert record["clean"].correct == first["clean"].correct
    assert record["fgsm"].correct > first["fgsm"].correct
    assert "no_gradient" in record["fgsm"].flags
    assert "attacks anew" in evaluate(tmp_path, "checkpoint=weights.pt", *options).out


def test_a_finished_evaluation_of_other_pictures_is_none(theirs: Path, tmp_path: Path) -> None:
    shutil.copytree(theirs, tmp_path, dirs_exist_ok=True)
    for number in range(10):
        for split in ("train", "test"):
            (tmp_path / f"pictures/{split}/{number}").mkdir(parents=True)
            grey = np.full((8, 8), 25 * number, dtype=np.uint8)
            Image.fromarray(grey).save(tmp_path / f"pictures/{split}/{number}/0.png")
    options = ("model._target_=their_package.Net", "dataset=folder", "dataset.root=pictures", "dataset.channels=1")
    options += ("dataset.image_size=8", "evaluation=none", "checkpoint=weights.pt")
    record_of(evaluate(tmp_path, *options), tmp_path)
    assert "attacks anew" in evaluate(tmp_path, *options).out
    Image.fromarray(np.full((8, 8), 255, dtype=np.uint8)).save(tmp_path / "pictures/test/0/0.png")
    assert "attacks anew" not in evaluate(tmp_path, *options).out


def test_numbers_go_to_wandb_where_it_is_asked(theirs: Path, tmp_path: Path) -> None:
    options = (
        "evaluation=chosen",
        "evaluation/attacks=[fgsm]",
        "evaluation.n=12",
        "logger=wandb",
        f"output={tmp_path}",
    )
    done = evaluate(theirs, "checkpoint=weights.pt", *OWN, *options)
    record = record_of(done, theirs)
    (folder,) = tmp_path.iterdir()
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    written = (folder / "metrics.csv").read_text()
    assert "test/fgsm" in written
    assert f"{100 * record['fgsm'].accuracy:.9g}" in written


def test_a_network_without_a_gradient_is_audited(theirs: Path) -> None:
    """No attack can follow a slope that is not there: every row says so, and the audit fails."""
    own = ("model._target_=their_package.NoGradient", "dataset=digits", "evaluation=audit")
    done = evaluate(theirs, "checkpoint=weights.pt", *own, "evaluation.n=20", "evaluation.audit.queries=5")
    record = record_of(done, theirs)
    assert all("no_gradient" in row.flags for row in record.attacks if row.name != "clean")
    assert record.audit["verdict"] == "fail"
    (said,) = [finding for finding in record.audit["findings"] if finding["check"] == "zero_grad"]
    assert said["severity"] == "fail"


def test_other_weights_are_another_record(theirs: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    """The file's name and place say nothing; its bits do."""
    found = []
    for number in range(3):
        torch.save({**weights, "layers.6.bias": weights["layers.6.bias"] + (number == 2)}, theirs / "same.pt")
        options = ("evaluation=none", "evaluation.n=5", f"output={tmp_path}/{number}")
        found.append(record_of(evaluate(theirs, "checkpoint=same.pt", *OWN, *options), theirs).config_hash)
    assert found[0] == found[1] != found[2]


def test_by_the_name_of_a_model(tmp_path: Path) -> None:
    net = io.build_net({"_target_": "mi_at.models.cnn.CNNTiny", "num_classes": 10, "in_channels": 1, "image_size": 8})
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, tmp_path / "a.pt")
    done = evaluate(
        tmp_path, "checkpoint=a.pt", "model=cnn_tiny", "dataset=digits", "evaluation=none", "evaluation.n=9"
    )
    record = record_of(done, tmp_path)
    assert record.key == "a-digits-cnn_tiny"
    images = io.build_data({"_target_": "mi_at.data.digits.Digits"})
    images.setup("test")
    batch = next(iter(images.test_dataloader()))
    assert record["clean"].correct == int((net.eval()(batch.x[:9]).argmax(1) == batch.y[:9]).sum())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("dataset=digits",),
            ("weights.pt holds weights that mi_at has not trained", "model= one of", "my_package.Net"),
        ),
        (("model._target_=their_package.Net",), ("say which dataset", "dataset= one of cifar10", "mnist")),
        (("model=cnn_tiny", "dataset=digits"), ("does not fit the network CNNTiny", "missing: ", "unexpected: layers")),
        ((*OWN, "+model.hidden=9"), ("of another shape: layers.2.weight (24, 64) instead of (9, 64)",)),
        ((*OWN, "model.num_classes=3"), ("of another shape: layers.6.weight (10, 24) instead of (3, 24)",)),
        (("model._target_=their_package.Net", "dataset=mnist", "dataset.root=nowhere"), ("nowhere",)),
        ((*OWN, "evaluation=adaptive"), ("maximises the loss of the training", "a checkpoint of mi_at")),
        ((*OWN, "evaluation=black_box"), ("is made on another network", "evaluation.surrogate=")),
        ((*OWN, "evaluation=black_box", "evaluation.surrogate=weights.pt"), ("weights.pt was not written by mi_at",)),
        ((*OWN, "evaluation.n=1000"), ("n=1000", "360")),
        ((*OWN, "checkpoint=."), ("checkpoint . is a folder; give a file, such as best.ckpt",)),
        (
            (*OWN, "evaluation=chosen", "evaluation.n_of.square=9"),
            ("unknown key evaluation.n_of.square", "+evaluation.n_of.square=<value> adds it"),
        ),
        ((*OWN, "evaluation.n=abc"), ("evaluation.n=abc: expected a whole number",)),
        ((*OWN, "evaluation.n_of.autoattack=1.5"), ("evaluation.n_of.autoattack=1.5: expected a whole number",)),
        (
            (*OWN, "evaluation=chosen", "evaluation/attacks=[fgsm,representation]", "evaluation.n=20"),
            ("attack representation: tap='features'", "no taps"),
        ),
        ((*OWN, "evaluation.eps=8"), ("eps=8", "did you mean 8/255?")),
        (
            (*OWN, "evaluation=chosen", "evaluation.attacks=[fgsm]"),
            ("names of files are chosen with a slash, evaluation/attacks=[...]",),
        ),
        (("model._target_=their_package.Nett", "dataset=digits"), ("expected the path of an importable class",)),
        (("model._target_=their_package.Broken", "dataset=digits"), ("Broken does not take images", "my own mistake")),
    ],
)
def test_what_is_wrong_is_named(theirs: Path, overrides: tuple[str, ...], words: tuple[str, ...]) -> None:
    before = set(theirs.rglob("*.json"))
    done = evaluate(theirs, "checkpoint=weights.pt", *overrides)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err, done.err
    assert set(theirs.rglob("*.json")) == before


# ---------------------------------------------------------------- files
def wrapped(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in weights.items()}


WRAPPED: dict[str, Any] = {
    "plain": lambda w: w,
    "OrderedDict": OrderedDict,
    "DataParallel": lambda w: wrapped(w, "module."),
    "compiled": lambda w: wrapped(w, "_orig_mod."),
    "compiled DataParallel": lambda w: wrapped(w, "_orig_mod.module."),
    "Lightning": lambda w: {"state_dict": {**wrapped(w, "model."), "metric.total": torch.ones(1)}, "epoch": 3},
    "net": lambda w: {"net": wrapped(w, "module."), "acc": 93.2, "epoch": 7},
    "tutorial": lambda w: {"model_state_dict": w, "optimizer_state_dict": {"state": {}}, "loss": torch.ones(1)},
    "nested": lambda w: {"model": {"state_dict": wrapped(w, "net.")}},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_usual_ways_to_save_weights(
    theirs: Path, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.syspath_prepend(theirs)
    torch.save(WRAPPED[kind](weights), tmp_path / "a.pt")
    found = io.read_weights(tmp_path / "a.pt")
    assert isinstance(found, io.Weights)
    net = io.load_own(found, {"_target_": "their_package.Net", "num_classes": 10})
    assert not any(module.training for module in net.modules())
    state = net.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in state.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"holds the keys \(none\) and no weights; save the weights alone, torch.save\(net.state_dict\(\)"),
        ({"epoch": 3, "weights": {"a": torch.ones(1)}}, "holds the keys epoch, weights and no weights"),
        ([torch.ones(1)], "holds a list and no weights"),
        (torch.ones(1), "holds a Tensor and no weights"),
        ({"net": {"a": torch.ones(1)}, "state_dict": {"a": torch.ones(1)}}, "several sets .* under state_dict, net"),
        ({"a": torch.ones(1), "b": torch.tensor([torch.nan])}, "a value that is not finite among the weights b"),
    ],
)
def test_files_without_weights(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(io.CheckpointError, match=message):
        io.read_weights(tmp_path / "a.pt")


class Planted:
    """Unpickled, it runs a command."""

    def __reduce__(self) -> Any:
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


@pytest.mark.parametrize("content", [nn.Linear(1, 1), {"state_dict": {"a": torch.ones(1)}, "x": Planted()}])
def test_code_is_refused_and_the_way_out_named(run_folder: Path, content: Any) -> None:
    torch.save(content, run_folder / "a.pt")
    with pytest.raises(
        io.CheckpointError, match=r"pickled code .* refused.*torch.save\(net.state_dict\(\), 'weights.pt'"
    ):
        io.read_weights(run_folder / "a.pt")
    assert [path.name for path in run_folder.iterdir()] == ["a.pt"]


def test_weights_that_are_there_twice(tmp_path: Path) -> None:
    state = nn.Linear(2, 2).state_dict()
    torch.save({**wrapped(state, "net."), **wrapped(state, "model.")}, tmp_path / "a.pt")
    found = io.read_weights(tmp_path / "a.pt")
    assert isinstance(found, io.Weights)
    with pytest.raises(io.CheckpointError, match=r"more than once, under net\. and model\."):
        io.named_as(found, nn.Linear(2, 2))


# ---------------------------------------------------------------- checkpoints of mi_at keep what they carry
@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with best.ckpt of a run on digits."""
    from tests.commands import tiny

    folder = tmp_path_factory.mktemp("trained")
    done = command(folder, *tiny("run_dir=.", "defense=standard_at"))
    assert done.code == 0, done.err
    return folder


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("dataset=mnist",), ("dataset=mnist", "a run of mi_at on digits", "leave out dataset=")),
        (
            ("model=cnn4",),
            ("model._target_=mi_at.models.cnn.CNN4", "with mi_at.models.cnn.CNNTiny", "leave out model="),
        ),
        (("model=cnn_tiny",), ("model.width=1.0", "with 0.25", "leave out model=")),
        (("dataset=digits", "dataset.split_seed=1"), ("dataset.split_seed", "only root, placement, download")),
    ],
)
def test_a_run_is_not_what_the_command_says(trained: Path, overrides: tuple[str, ...], words: tuple[str, ...]) -> None:
    done = evaluate(trained, "checkpoint=best.ckpt", "evaluation=none", *overrides)
    assert (done.code, "Traceback" in done.err) == (1, False)
    for word in words:
        assert word in done.err, done.err


def test_a_run_may_be_said_again(trained: Path) -> None:
    said = ("dataset=digits", "model=cnn_tiny", "model.width=0.25", "evaluation=none", "evaluation.n=10")
    one = record_of(evaluate(trained, "checkpoint=best.ckpt", *said), trained)
    other = record_of(evaluate(trained, "checkpoint=best.ckpt", *said[3:]), trained)
    assert one.config_hash == other.config_hash
    assert one["clean"].correct == other["clean"].correct


# ---------------------------------------------------------------- from Python
class Linear(nn.Module):
    """Two classes; the margin is 2 (x_0 - x_1), so l_inf eps moves it by 4 eps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def test_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """On a linear network the robust accuracy is known: |x_0 - x_1| > 2 eps."""
    margins = torch.tensor([0.05, 0.15, 0.25, 0.35, 0.45])
    images = torch.stack([0.5 + margins / 2, 0.5 - margins / 2], dim=1).view(5, 1, 1, 2)
    labels = torch.zeros(5, dtype=torch.long)
    result = mi_at.robustness(
        Linear(),
        (images, labels),
        evaluation="quick",
        eps="1/10",
        progress=False,
        overrides=["evaluation.attacks.autoattack.queries=20"],  # its protocol's 100 images are more than there are
    )
    print(result)
    assert result["clean"].accuracy == 1.0
    for name in ("fgsm", "pgd_20", "cw_inf", "autoattack"):
        assert (result[name].correct, result[name].n, result[name].eps) == (3, 5, 0.1), name
    assert (result["pgd_20"].step_size, result["pgd_20"].norm) == (0.025, "linf")
    assert result.outcomes["pgd_20"].correct.tolist() == [False, False, True, True, True]
    assert result.record.key == "own-given-linear"
    out = capsys.readouterr().out
    assert "pgd_20" in out
    assert "60.0" in out


def test_a_network_at_hand_keeps_its_mode_and_its_weights() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10), nn.Dropout(0.5)).train()
    net[3].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    options = {"evaluation": "chosen", "overrides": ["evaluation/attacks=[fgsm]"], "progress": False}
    robustness(net, "digits", n=20, **options)  # type: ignore[arg-type]
    assert [module.training for module in net] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_set_by_name_has_its_customary_ball() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    options = {"evaluation": "chosen", "n": 12, "progress": False}
    found = robustness(net, "digits", overrides=["evaluation/attacks=[pgd_10]"], **options)  # type: ignore[arg-type]
    assert (found["pgd_10"].eps, found["pgd_10"].step_size, found["pgd_10"].n) == (0.15, 0.03, 12)
    assert found.record.key == "own-digits-sequential"
    other = robustness(
        net, "digits", norm="l2", eps=1, step_size="1/4", overrides=["evaluation/attacks=[pgd_10]"], **options
    )  # type: ignore[arg-type]
    assert (other["pgd_10"].norm, other["pgd_10"].eps, other["pgd_10"].step_size) == ("l2", 1, 0.25)


def test_a_ball_of_zero_is_clean() -> None:
    found = robustness(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), ONE, evaluation="quick", eps=0, progress=False)
    assert {row.correct for row in found.record.attacks} == {found["clean"].correct}


ONE = (torch.rand(4, 1, 8, 8), torch.arange(4))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (ONE, {}, r"eps=None: images at hand have no customary radius; give one, such as eps='8/255'"),
        (ONE, {"eps": 8}, r"eps=8: pixels are in \[0, 1\]; did you mean 8/255"),
        (ONE, {"eps": 0.1, "evaluation": "standart"}, "evaluation=standart: .* did you mean standard"),
        (ONE, {"eps": 0.1, "n": 5}, "n=5, but the split has 4 samples"),
        (ONE, {"evaluation": "adaptive", "eps": 0.1}, "maximises the loss of the training"),
        ((ONE[0] * 255, ONE[1]), {"eps": 0.1}, r"expected \[0, 1\]"),
        ((ONE[0], ONE[1] + 8), {"eps": 0.1}, r"labels lie in \[8, 11\], but the network has 10 classes"),
        ((ONE[0], ONE[1][:3]), {"eps": 0.1}, r"data=\(torch.float32 \(4, 1, 8, 8\) and torch.int64 \(3,\)\)"),
        ((ONE[0], np.arange(4)), {"eps": 0.1}, "numpy.ndarray"),
        ([ONE], {"eps": 0.1}, "data=list of 1: expected the name of a data set, or two tensors"),
        (iter([ONE]), {"eps": 0.1}, "data=list_iterator: expected the name of a data set, or two tensors"),
        (ONE, {"eps": "8/0"}, "eps='8/0': expected a number or a fraction"),
        (ONE, {"eps": 0.1, "step_size": "a"}, "step_size='a': expected a number or a fraction"),
        (ONE, {"eps": 0.1, "overrides": ["evaluation.n_of.autoattack=9"]}, "n_of.autoattack=9, but the split has 4"),
        (ONE, {"eps": 0.1, "evaluation": "none"}, "eps=0.1: evaluation=none attacks nothing; leave it out"),
        (ONE, {"eps": 0.1, "overrides": "evaluation.n=2"}, r"overrides='evaluation.n=2': expected a list of them, \["),
        (ONE, {"eps": 0.1, "overrides": ["processes=2"]}, r"overrides=\['processes=2'\]: mi_at.robustness has no use"),
        (ONE, {"eps": 0.1, "overrides": ["dataset=mnist"]}, "expected what begins with evaluation. or evaluation/"),
        (ONE, {"eps": 0.1, "evaluation": "black_box"}, "is made on another network: give its checkpoint"),
        ((ONE[0] * torch.nan, ONE[1]), {"eps": 0.1}, "images hold NaN"),
        ("imagenet", {}, "dataset=imagenet: expected one of cifar10"),
        ("cifar10", {"overrides": ["dataset.root=nowhere"]}, "nowhere"),
    ],
)
def test_what_is_wrong_from_python(data: Any, options: dict[str, Any], message: str) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        robustness(net, data, progress=False, **options)


def test_a_function_is_no_network() -> None:
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module"):
        robustness(lambda x: x.flatten(1), ONE, eps=0.1)  # type: ignore[arg-type]
