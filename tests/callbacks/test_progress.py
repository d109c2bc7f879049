"""One bar in a terminal, a few lines elsewhere, and no waiting for a GPU."""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import Callback

from mi_at.callbacks import progress
from mi_at.callbacks.checkpoints import Last
from mi_at.callbacks.progress import LINES, Progress
from tests.callbacks import fits


class Terminal(io.StringIO):
    """A terminal that does not say how wide it is."""

    def isatty(self) -> bool:
        return True

    def states(self) -> list[str]:
        """What stood in it, one after the other."""
        return [text.strip() for text in re.split(r"[\r\n]", self.getvalue()) if text.strip()]


def test_one_line_per_epoch(tmp_path: Path) -> None:
    stream = io.StringIO()
    fits.fit(tmp_path, [Progress(stream=stream)], epochs=3)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        assert re.fullmatch(rf"epoch {number}/3  loss \d\.\d{{3}}  clean \d+\.\d  robust \d+\.\d  \d+\.\d s", line), (
            line
        )


def test_the_loss_is_the_mean_of_the_epoch(tmp_path: Path) -> None:
    stream, losses = io.StringIO(), []

    class Watch(Progress):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    fits.fit(tmp_path, [Watch(stream=stream)], epochs=1, val=0)
    assert f"loss {sum(losses) / 4:.3f}" in stream.getvalue()
    assert "clean" not in stream.getvalue()


def test_accumulated_batches_do_not_shrink_the_loss(tmp_path: Path) -> None:
    shown = []
    for accumulated in (1, 2):
        stream = io.StringIO()
        defense = fits.module()
        defense.optimisation = None
        defense.configure_optimizers = lambda net=defense.net: torch.optim.SGD(net.parameters(), lr=0.0)
        options = {"accumulate_grad_batches": accumulated}
        fits.fit(tmp_path, [Progress(stream=stream)], epochs=1, val=0, defense=defense, options=options)
        shown.append(re.search(r"loss (\d\.\d+)", stream.getvalue()).group(1))
    assert shown[0] == shown[1]


def test_many_epochs_few_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    fits.fit(tmp_path, [Progress(stream=stream)], epochs=95, train=1, val=0)
    numbers = [int(re.match(r"epoch (\d+)/95", line).group(1)) for line in stream.getvalue().splitlines()]
    assert numbers[0] == 1
    assert numbers[-1] == 95
    assert 20 <= len(numbers) <= LINES + 2


def test_validation_of_an_earlier_epoch_is_not_repeated(tmp_path: Path) -> None:
    stream = io.StringIO()
    fits.fit(tmp_path, [Progress(stream=stream)], epochs=3, options={"check_val_every_n_epoch": 2})
    assert ["robust" in line for line in stream.getvalue().splitlines()] == [False, True, False]


def test_one_bar_over_all_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    stream = Terminal()
    fits.fit(tmp_path, [Progress(stream=stream), Last(tmp_path)], epochs=2)
    states = stream.states()
    assert "0/8" in states[0]
    assert any("epoch 1/2, validation" in state for state in states)
    assert re.search(r"epoch 2/2 100%\|.*\| 8/8, loss \d\.\d+  clean [\d.]+  robust [\d.]+ \[.* left\]", states[-1])
    assert stream.getvalue().count("\n") == 1, "one bar, closed at the end"

    stream = Terminal()
    fits.fit(tmp_path, [Progress(stream=stream), Last(tmp_path)], epochs=3, ckpt=tmp_path / "last.ckpt")
    assert "8/12" in stream.states()[0], "a resumed run begins where it stands"
    assert "12/12" in stream.states()[-1]


def test_max_steps_end_the_bar(tmp_path: Path) -> None:
    stream = Terminal()
    fits.fit(tmp_path, [Progress(stream=stream)], epochs=9, val=0, options={"max_steps": 6})
    assert "6/6" in stream.states()[-1]
    plain = io.StringIO()
    fits.fit(tmp_path, [Progress(stream=plain)], epochs=9, val=0, options={"max_steps": 6})
    assert plain.getvalue().splitlines()[-1].startswith("epoch 2/9")


def test_an_error_closes_the_bar(tmp_path: Path) -> None:
    stream = Terminal()
    bar = Progress(stream=stream)

    class Fails(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fits.fit(tmp_path, [bar, Fails()], epochs=1)
    assert stream.getvalue().endswith("\n")


def test_print_goes_above_the_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()

    class Says(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.progress_bar_callback.print("half", "way")

    bar = Progress(stream=stream)
    fits.fit(tmp_path, [bar, Says()], epochs=1)
    assert "half way" in stream.states()
    bar.print("after", "it")
    assert capsys.readouterr().out == "after it\n"


def test_other_processes_are_silent(tmp_path: Path) -> None:
    stream = io.StringIO()
    bar = Progress(stream=stream)
    bar.disable()
    fits.fit(tmp_path, [bar], epochs=1)
    assert stream.getvalue() == ""
    bar.enable()
    fits.fit(tmp_path, [bar], epochs=1)
    assert stream.getvalue()


def test_on_a_gpu_it_looks_at_the_loss_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(value=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.value))
    looks: dict[str, list[int]] = {"cpu": [], "meta": []}
    for device, found in looks.items():
        bar = Progress(stream=io.StringIO())
        bar._loss = torch.zeros((), device=device)
        for step in range(1, 101):
            now.value += 0.3
            if bar._due(SimpleNamespace(global_step=step)):
                found.append(step)
    assert looks["cpu"] == list(range(2, 101, 2)), "every half second"
    assert looks["meta"] == [20, 40, 60, 80, 100], "and there also at most every 20 steps"
