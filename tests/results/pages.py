"""Records with everything a page can show, and a reader of HTML that is stricter than a browser."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.pgd import PGD
from mi_at.evaluation import EvaluationResult, evaluate
from mi_at.evaluation.outcomes import Examples
from mi_at.results.page_html import SHAPES, VOID
from mi_at.results.records import Record, make_record, read_outcomes, write_outcomes
from tests.evaluation.nets import images, loader, predicted, small_conv
from tests.results.makers import NAMES, config

MEASURED = sorted((Path(__file__).resolve().parents[2] / "results/measured").glob("*/*/seed0/record.json"))

TERMS = {
    "share/ce": {"min": 0.25, "mean": 0.5, "max": 1.0},
    "gradient/ce": {"min": 0.1, "mean": 0.6, "max": 1.5},
    "share/mi": {"min": "nan", "mean": "nan", "max": "nan"},
}
FINDINGS = [
    {"check": "reach", "severity": "pass", "measured": 0.4, "threshold": 0.3, "meaning": "far enough", "todo": ""},
    {
        "check": "steps",
        "severity": "warn",
        "measured": "1.4",
        "threshold": "1",
        "meaning": "drops",
        "todo": "more steps",
    },
    {
        "check": "unbounded",
        "severity": "fail",
        "measured": 0.25,
        "threshold": 0.01,
        "meaning": "masked",
        "todo": "adapt",
    },
    {
        "check": "adaptive",
        "severity": "not checked",
        "measured": "",
        "threshold": "",
        "meaning": "no loss",
        "todo": "run",
    },
]
AUDIT = {"verdict": "fail", "findings": FINDINGS}


def attacks(eps: float = 0.05) -> dict[str, Any]:
    """Two of one threat model, a curve over eps, a curve over steps."""
    made: dict[str, Any] = {"fgsm": FGSM(eps=eps), "pgd_5": PGD(eps=eps, step_size=eps / 4, steps=5)}
    made |= {f"pgd_5_eps_{k}": PGD(eps=k * eps, step_size=k * eps / 4, steps=5) for k in (2, 4)}
    return made | {f"pgd_{k}": PGD(eps=eps, step_size=eps / 4, steps=k) for k in (1, 10)}


def evaluation(n: int = 60, *, seed: int = 0, channels: int = 1, **options: Any) -> EvaluationResult:
    """Of a network that is right about four times out of five."""
    net, x = small_conv(4, channels=channels, seed=seed), images(n, side=8, channels=channels)
    y = predicted(small_conv(4, channels=channels, seed=0), x)
    y[::5] = torch.arange(len(y[::5])) % 4
    return evaluate(net, options.pop("attacks", attacks()), loader(x, y), progress=False, **options)


def examples(result: EvaluationResult, *, channels: int = 1) -> dict[str, Examples]:
    """Of two attacks; real images moved by eps, whatever became of them."""
    x = images(3, side=8, channels=channels)
    x_adv = (x + 0.05 * torch.sign(x - 0.5)).clamp(0, 1)
    known = {
        "index": torch.tensor([2, 5, 7]),
        "label": torch.tensor([0, 1, 3]),
        "clean_prediction": torch.tensor([0, 1, 3]),
        "prediction": torch.tensor([3, 2, 1]),
        "confidence": torch.tensor([0.99, 0.75, 0.5]),
    }
    return {name: Examples(x=x, x_adv=x_adv, **known) for name in ("fgsm", "pgd_5") if name in result.attacks}


def record(result: EvaluationResult, **options: Any) -> Record:
    """A record of it, with terms of a loss."""
    options = {"names": NAMES, "checkpoint": {"rule": "best", "epoch": 12}, "training": {"terms": TERMS}, **options}
    return make_record(result, config=options.pop("config", config(evaluation__eps=0.05)), **options)


def outcomes(result: EvaluationResult, folder: Path) -> dict[str, Any]:
    """As they are read back."""
    return read_outcomes(write_outcomes(folder / "outcomes.npz", result))


class Tree(HTMLParser):
    """What a page is made of; raises where a tag is not closed in its place."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.styles = ""
        self.feed(page)
        self.close()
        assert self.open == [], f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag not in SHAPES, f"<{tag}> of SVG must close itself"
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice: {names}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        assert tag in SHAPES, f"<{tag}/> is no empty element of HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data
        else:
            self.words.append(data)

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]
