"""Pieces: kept, found again after a kill, computed once by however many processes, refused where they do not fit."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from mi_at.attacks.autoattack import AutoAttack
from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.packing import Kept
from mi_at.attacks.pgd import PGD
from mi_at.evaluation import EvaluationError, EvaluationResult, evaluate
from mi_at.evaluation.evaluate import _block, fitting_batch_size
from mi_at.evaluation.pieces import Pieces, fingerprint
from tests.evaluation.interrupted import Slow, run, same, samples
from tests.evaluation.nets import Halfspace, Planted, images, loader, predicted, small_conv

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def expected() -> EvaluationResult:
    """Undisturbed, by one process, nothing kept."""
    result = run(None)
    assert all(0.1 < row.accuracy < result.clean.accuracy for row in result.attacks.values())
    assert result["aa"].accuracy < result["starts"].accuracy
    return result


def start(state: Path, processes: int = 1) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.evaluation.interrupted", str(state), str(processes)]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finished(state: Path) -> list[Path]:
    return sorted(state.rglob("*.npz"))


def wait_for(count: int, state: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while len(finished(state)) < count:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def killed(tmp_path: Path) -> tuple[Path, list[Path]]:
    """The folder of an evaluation that was killed at a random moment, and what it had finished."""
    process = start(tmp_path / "state")
    wait_for(random.SystemRandom().randint(2, 12), tmp_path / "state", process)
    time.sleep(random.SystemRandom().random() * 0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return tmp_path / "state", finished(tmp_path / "state")


def test_killed_and_resumed_is_the_same(killed: tuple[Path, list[Path]], expected: EvaluationResult) -> None:
    state, before = killed
    times = {path: path.stat().st_mtime_ns for path in before}
    assert times
    same(run(state), expected)
    # What was finished was not computed again, and the rest was.
    assert {path: path.stat().st_mtime_ns for path in before} == times
    assert len(finished(state)) > len(before)
    # A third sitting computes nothing at all, whatever its batch size, once it knows the network.
    done = {path: path.stat().st_mtime_ns for path in finished(state)}
    counted = Counting(Slow())
    same(run(state, net=counted.net, batch_size=50), expected)
    assert counted.forwards == IDENTIFYING
    assert {path: path.stat().st_mtime_ns for path in finished(state)} == done


IDENTIFYING = 4
"""Forwards of the first images by which an evaluation tells whether the network is still the same."""


class Counting:
    """Counts the forwards of a network without changing it."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.forwards = net, 0
        net.register_forward_hook(self.count)

    def count(self, module: nn.Module, inputs: object, output: object) -> None:
        self.forwards += 1


def test_state_changes_nothing(tmp_path: Path, expected: EvaluationResult) -> None:
    same(run(tmp_path / "state"), expected)


@pytest.mark.slow
def test_two_commands_share_a_folder(tmp_path: Path, expected: EvaluationResult) -> None:
    """As on two machines: neither knows of the other."""
    other = start(tmp_path)
    try:
        wait_for(3, tmp_path, other)
        same(run(tmp_path, net=Slow(0.02)), expected)
    finally:
        other.wait()
    assert other.returncode == 0, other.stderr.read() if other.stderr else ""
    assert not [path for path in tmp_path.rglob("*") if path.suffix not in (".npz", ".lock") and path.is_file()]


def test_two_processes_without_a_folder_leave_nothing(
    tmp_path: Path, expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    same(run(None, processes=2), expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_helpers_of_a_killed_evaluation_end_with_it(tmp_path: Path) -> None:
    process = start(tmp_path, processes=2)
    wait_for(4, tmp_path, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("no /proc")
    helpers = [int(pid) for pid in children.read_text().split()]
    assert helpers
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in helpers):
        assert time.monotonic() < deadline, "a helper outlived the evaluation"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


# ---------------------------------------------------------------- what belongs to what
def evaluated(state: Path, net: nn.Module, attack: PGD, **options: object) -> int:
    """How many forwards an evaluation costs."""
    counted = Counting(net)
    x = images(40, side=8)
    y = predicted(small_conv(), x)
    settings: dict = {"progress": False, "batch_size": 16, "state": state, **options}
    evaluate(net, {"pgd": attack}, loader(x, y), **settings)
    return counted.forwards


def test_what_can_change_an_outcome_is_computed_anew(tmp_path: Path) -> None:
    pgd = {"eps": 0.02, "step_size": 0.01, "steps": 2}
    assert evaluated(tmp_path, small_conv(), PGD(**pgd)) > IDENTIFYING
    assert evaluated(tmp_path, small_conv(), PGD(**pgd)) == IDENTIFYING
    assert evaluated(tmp_path, small_conv(), PGD(**{**pgd, "eps": 0.03})) > IDENTIFYING
    assert evaluated(tmp_path, small_conv(), PGD(**{**pgd, "steps": 3})) > IDENTIFYING
    assert evaluated(tmp_path, small_conv(), PGD(**pgd), seed=1) > IDENTIFYING
    assert evaluated(tmp_path, small_conv(seed=1), PGD(**pgd)) > IDENTIFYING
    moved = small_conv()
    with torch.no_grad():
        moved[0].bias[0] += 1e-6
    assert evaluated(tmp_path, moved, PGD(**pgd)) > IDENTIFYING
    # The first samples of a longer evaluation are other pieces; an attack more is not.
    assert evaluated(tmp_path, small_conv(), PGD(**pgd), n=30) > IDENTIFYING
    assert evaluated(tmp_path, small_conv(), PGD(**pgd)) == IDENTIFYING


def test_fingerprints() -> None:
    net, x = small_conv(), torch.rand(3, 2)
    parts = [1, "1", 1.5, None, True, [1, 2], [[1], 2], {"a": 1}, {"a": 2}, {"b": 1}, x, x + 1, x.double(), x.t(), net]
    parts += [small_conv(seed=1), PGD(eps=0.1, step_size=0.1, steps=1), PGD(eps=0.1, step_size=0.1, steps=2), predicted]
    parts += [torch.zeros(0), torch.tensor(1), torch.tensor(True), x.bfloat16(), nn.ReLU(), nn.Tanh()]
    marks = [fingerprint(part) for part in parts]
    assert len(set(marks)) == len(parts)
    assert marks == [fingerprint(part) for part in parts]
    assert fingerprint(small_conv()) == fingerprint(net)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


# ---------------------------------------------------------------- pieces themselves
def test_pieces_keep_tensors_and_text(tmp_path: Path) -> None:
    kept: Kept = {
        "none": torch.zeros(0, 3),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "text": '{"flag": "mit Umlauten: ä"}',
        "empty": "",
    }
    pieces = Pieces(tmp_path / "a" / "b")
    ((_, first),) = pieces.run(["piece"], lambda number: kept)
    ((_, again),) = Pieces(tmp_path / "a" / "b").run(["piece"], lambda number: pytest.fail("computed twice"))
    for found in (first, again):
        assert set(found) == {*kept, "seconds"}
        for name, value in kept.items():
            if isinstance(value, str):
                assert found[name] == value
            else:
                assert torch.equal(found[name], value)
                assert found[name].dtype == value.dtype
    assert pieces.seconds == float(first["seconds"])


def test_a_damaged_piece_is_computed_again(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path)
    list(pieces.run(["piece"], lambda number: {"x": torch.ones(100)}))
    whole = (tmp_path / "piece.npz").read_bytes()
    for damage in (b"", whole[: len(whole) // 2], b"no archive at all"):
        (tmp_path / "piece.npz").write_bytes(damage)
        ((_, kept),) = Pieces(tmp_path).run(["piece"], lambda number: {"x": torch.full((100,), 2.0)})
        assert torch.equal(kept["x"], torch.full((100,), 2.0))


def test_pieces_of_others_are_waited_for_or_left_out(tmp_path: Path) -> None:
    code = (
        "import sys, time, torch; from pathlib import Path; from mi_at.evaluation.pieces import Pieces\n"
        "def slow(number):\n"
        "    print('computing', flush=True); sys.stdin.readline(); return {'x': torch.ones(1)}\n"
        "list(Pieces(Path(sys.argv[1])).run(['b'], slow))"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == b"computing\n"
        pieces = Pieces(tmp_path)
        mine = dict(pieces.run(["a", "b", "c"], lambda number: {"x": torch.zeros(1)}, wait=False))
        assert sorted(mine) == [0, 2]
        other.stdin.write(b"\n")
        other.stdin.flush()
        everything = list(pieces.run(["a", "b", "c"], lambda number: pytest.fail("computed twice")))
        assert [number for number, _ in everything] in ([0, 2, 1], [0, 1, 2])
        assert dict(everything)[1]["x"].item() == 1.0
    finally:
        other.kill()
        other.wait()


def test_a_claim_dies_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; from pathlib import Path; from mi_at.evaluation.pieces import Pieces\n"
        "list(Pieces(Path(sys.argv[1])).run(['a'], lambda number: os.kill(os.getpid(), signal.SIGKILL)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPO, check=False)
    assert done.returncode == -signal.SIGKILL
    ((_, kept),) = Pieces(tmp_path).run(["a"], lambda number: {"x": torch.ones(1)})
    assert kept["x"].item() == 1.0


def test_an_error_lets_go_of_the_piece(tmp_path: Path) -> None:
    def fails(number: int) -> Kept:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(Pieces(tmp_path).run(["a"], fails))
    ((_, kept),) = Pieces(tmp_path).run(["a"], lambda number: {"x": torch.ones(1)}, wait=False)
    assert kept["x"].item() == 1.0


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match=r"state=.*file/state: .*; choose another folder"):
        evaluate(Halfspace(), {}, loader(images(4), torch.zeros(4).long()), state=tmp_path / "file" / "state")


def test_what_cannot_be_sent_to_another_process_is_named() -> None:
    class Local(Halfspace):
        pass

    x = images(8)
    with pytest.raises(EvaluationError, match=r"processes=2: .*cannot be sent to another process"):
        evaluate(Local(), {"f": FGSM(eps=0.1)}, loader(x, torch.zeros(8).long()), processes=2, progress=False)
    planted = {"f": Planted(lambda net, x, y: x)}
    with pytest.raises(EvaluationError, match=r"define its class at the top of a module, or use processes=1"):
        evaluate(Halfspace(), planted, loader(x, torch.zeros(8).long()), processes=2, progress=False)
    assert torch.get_num_threads() == 1


def test_size_of_a_piece_is_that_of_the_first_sitting(tmp_path: Path) -> None:
    assert _block(Pieces(None), "", 10, 1000, 1) is None
    assert _block(Pieces(tmp_path), "key", 10, 1000, 1) == 40
    assert _block(Pieces(tmp_path), "key", 500, 1000, 4) == 40
    assert _block(Pieces(tmp_path), "other", 500, 1000, 4) == 125


def test_batch_size_of_ones_own_choice_on_a_cpu() -> None:
    assert fitting_batch_size(small_conv(), images(4, side=8), torch.device("cpu")) == 128
    _, x, y = samples()
    assert evaluate(small_conv(), {}, loader(x, y), batch_size="auto", progress=False).batch_size == 128


def test_flags_survive_a_resumption(tmp_path: Path) -> None:
    """AutoAttack warns while it runs; a later sitting does not run it."""
    flat = nn.Sequential(small_conv(), nn.Softmax(dim=1))
    x = images(20, side=8)
    attacks = {"aa": AutoAttack(eps=0.02, attacks=["apgd-dlr"], batch_size=8)}
    rows = [
        evaluate(flat, attacks, loader(x, predicted(flat, x)), state=tmp_path, progress=False)["aa"] for _ in range(2)
    ]
    assert rows[0].flags == rows[1].flags
    assert "softmax" in rows[0].flags
    assert rows[0].messages == rows[1].messages
    assert rows[1].seconds == pytest.approx(rows[0].seconds)
