"""Progress: a bar in a terminal, a line per attack elsewhere, nothing on standard output."""

import io

import pytest

from mi_at.attacks.autoattack import AutoAttack
from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.pgd import PGD
from mi_at.evaluation import evaluate, progress
from tests.evaluation.nets import Halfspace, images, loader, predicted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use(bar: progress.Progress) -> None:
    with bar:
        bar.begin("pgd_20")
        bar.at(0.25, 20, 20)
        bar.at(0.5, 10, 20, note="square 1/2")
        bar.say("out of memory: 4 samples at once from here on")
        bar.end(0.5, 20, 1.25)


def test_plain_lines_are_sparse() -> None:
    stream = io.StringIO()
    use(progress.Progress({"pgd_20": 20}, stream=stream))
    assert stream.getvalue() == (
        "evaluation: pgd_20: out of memory: 4 samples at once from here on\n"
        "evaluation: pgd_20: 50.0 % right of 20 (1.2 s)\n"
    )


def test_long_attacks_say_something_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.0)
    stream = io.StringIO()
    use(progress.Progress({"pgd_20": 20}, stream=stream))
    first, second, *_ = stream.getvalue().splitlines()
    assert first == "evaluation: pgd_20: 100.0 % right of 20 so far, 0:00:00 left of everything"
    assert second == "evaluation: pgd_20: square 1/2, 50.0 % right of 20 so far, 0:00:00 left of everything"


def test_bar_shows_the_robust_accuracy_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    use(progress.Progress({"pgd_20": 20}, stream=stream))
    shown = stream.getvalue()
    for text in ("pgd_20", "50%", "50.0 % right of 20 so far", "left 0:00:00", "out of memory"):
        assert text in shown, text


def test_time_left_counts_what_is_left_of_all_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    bar = progress.Progress({"a": 100.0, "b": 300.0}, enabled=False)
    assert bar.left == "?"
    bar.begin("a")
    now += 10
    bar.at(0.5, 1, 1)  # 50 of 400 in 10 s: 70 s left
    assert bar.left == "0:01:10"
    bar.at(1.0, 1, 1, found=True)  # of an earlier sitting: 300 left at 5 a second
    assert bar.left == "0:01:00"
    bar.end(1.0, 1, 1.0)
    bar.begin("b")
    now += 20
    bar.at(1 / 3, 1, 1)
    assert bar.left == "0:00:40"


def test_cost_of_an_attack_in_forward_passes() -> None:
    assert progress.cost(FGSM(eps=0.1).describe()) == 2.0
    assert progress.cost(PGD(eps=0.1, step_size=0.1, steps=50, restarts=10).describe()) == 1000.0
    # shared/PERFORMANCE.md measured 9,700 per robust sample.
    assert progress.cost(AutoAttack(eps=0.1).describe()) == pytest.approx(9700)
    assert progress.cost({"attack": "of somebody else"}) > 0


def test_disabled_shows_nothing() -> None:
    for stream in (io.StringIO(), Terminal()):
        use(progress.Progress({"pgd_20": 20}, enabled=False, stream=stream))
        assert stream.getvalue() == ""


def test_evaluation_reports_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    net, x = Halfspace(), images(8)
    evaluate(net, {"fgsm": FGSM(eps=0.1)}, loader(x, predicted(net, x)))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("evaluation: fgsm: ")


@pytest.mark.parametrize("attack", ["fgsm", "worst", "restarts", "autoattack"])
def test_accuracy_on_the_way_goes_down_to_the_final_one(attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Halfspace(), images(40, low=0.2, high=0.8)
    y = predicted(net, x)
    y[::8] = 1 - y[::8]
    pgd = {"eps": 0.02, "step_size": 0.005, "steps": 4}
    attacks = {
        "fgsm": FGSM(eps=0.02),
        "worst": PGD(**pgd, iterate="worst"),
        "restarts": PGD(**pgd, restarts=2),
        "autoattack": AutoAttack(eps=0.02, attacks=["apgd-ce"], batch_size=8),
    }
    seen: list[tuple[float, int]] = []
    monkeypatch.setattr(progress.Progress, "at", lambda self, share, right, n, **options: seen.append((share, right)))
    result = evaluate(net, {attack: attacks[attack]}, loader(x, y), batch_size=8, progress=False)
    shares, right = [share for share, _ in seen], [right for _, right in seen]
    assert len(seen) > 3
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert right == sorted(right, reverse=True)
    assert right[-1] == int(result[attack].correct.sum())
    assert right[0] <= int(result.clean.correct.sum())
