"""Progress: a bar in a terminal, a line per attack elsewhere, nothing on standard output."""

import io

import pytest

from mi_at.attacks.fgsm import FGSM
from mi_at.evaluation import evaluate, progress
from tests.evaluation.nets import Halfspace, images, loader, predicted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use(bar: progress.Progress) -> None:
    with bar:
        bar.begin("pgd_20")
        bar.advance(10, 0, 10)
        bar.advance(10, 10, 20)
        bar.note("square 1/2")
        bar.end(0.5, 20, 1.25)


def test_plain_lines_are_sparse() -> None:
    stream = io.StringIO()
    use(progress.Progress(20, stream=stream))
    assert stream.getvalue() == "evaluation: pgd_20: 50.0 % right of 20 (1.2 s)\n"


def test_long_attacks_say_something_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY", 0.0)
    stream = io.StringIO()
    use(progress.Progress(20, stream=stream))
    assert "evaluation: pgd_20: 50.0 % right of 20\n" in stream.getvalue()
    assert "evaluation: pgd_20: square 1/2\n" in stream.getvalue()


def test_bar_shows_the_robust_accuracy() -> None:
    pytest.importorskip("rich")
    stream = Terminal()
    use(progress.Progress(20, stream=stream))
    assert "pgd_20" in stream.getvalue()
    assert "20/20" in stream.getvalue()


def test_disabled_shows_nothing() -> None:
    for stream in (io.StringIO(), Terminal()):
        use(progress.Progress(20, enabled=False, stream=stream))
        assert stream.getvalue() == ""


def test_evaluation_reports_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    net, x = Halfspace(), images(8)
    evaluate(net, {"fgsm": FGSM(eps=0.1)}, loader(x, predicted(net, x)))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("evaluation: fgsm: ")
