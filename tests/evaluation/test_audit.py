"""The audit: planted faults are found by the check that names them, honest networks are not accused."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mi_at.attacks.contexts import attacking
from mi_at.attacks.fgsm import FGSM
from mi_at.attacks.objectives import cross_entropy
from mi_at.attacks.pgd import PGD, pgd
from mi_at.data.digits import Digits
from mi_at.data.mnist import MNIST
from mi_at.evaluation import AttackResult, EvaluationResult, evaluate
from mi_at.evaluation.audit import CHECKS, audit, training_notes
from mi_at.evaluation.audit_attacks import own_variants
from mi_at.evaluation.audit_case import kind
from mi_at.evaluation.audit_findings import Audit, Finding, points, share
from mi_at.models.cnn import CNNTiny
from tests.evaluation import planted
from tests.evaluation.nets import Halfspace, Planted, images, loader, predicted, small_conv

EPS = 0.15
NAMES = [check.name for check, _ in CHECKS]
NEEDS_OTHERS = ["n_small", "reach", "subsumption", "selection", "overfit", "terms", "adaptive"]
"""Checks that read what these tests do not always give."""
Task = tuple[nn.Module, Tensor, Tensor]


def adversarially_trained(net: nn.Module, x: Tensor, y: Tensor, *, eps: float, epochs: int, steps: int) -> nn.Module:
    """Plain PyTorch: SGD on the cross-entropy of PGD images, eps growing over the first half."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    batches = len(x) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.05, epochs * batches)
    for epoch in range(epochs):
        radius = eps * min(1.0, 2 * (epoch + 1) / epochs)
        for places in torch.randperm(len(x), generator=generator)[: batches * 64].split(64):
            with attacking(net):
                x_adv = pgd(
                    cross_entropy(net, y[places]),
                    x[places],
                    eps=radius,
                    step_size=radius / 2,
                    steps=steps,
                    generator=generator,
                )
            loss = nn.functional.cross_entropy(net(x_adv), y[places])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return net.eval()


@pytest.fixture(scope="module")
def robust() -> Task:
    return robust_on_digits()


def robust_on_digits() -> Task:
    """A network that is robust to some degree, and the test images."""
    digits = Digits(batch_size=64, val_size=0)
    train, test = digits.read("train"), digits.read("test")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = CNNTiny(num_classes=10, in_channels=1, image_size=8, width=0.5)
    net = adversarially_trained(net, train.x.float() / 255, train.y, eps=EPS, epochs=6, steps=3)
    return net, test.x.float() / 255, test.y


def audited(net: nn.Module, x: Tensor, y: Tensor, *only: str, **options: Any) -> Audit:
    settings = {"eps": EPS, "n": 60, "steps": 10, "queries": 60, "restarts": 2, "progress": False}
    return audit(net, x, y, **{**settings, "only": only or None, **options})


def found(said: Audit) -> dict[str, str]:
    return {finding.check: finding.severity for finding in said.findings}


def test_an_audit_that_was_killed_goes_on(robust: Task, tmp_path: Path) -> None:
    """Nothing is attacked twice, and nothing is taken for something else."""
    net, x, y = robust
    sharp = planted.saturated(net)  # so that the temperatures are tried
    options: dict[str, Any] = {"variants": {"the raw one": net, "another one": small_conv()}, "restarts": 3}
    expected = audited(sharp, x, y, **options)
    assert audited(sharp, x, y, state=tmp_path, **options).findings == expected.findings
    forwards: list[int] = []
    hook = sharp.register_forward_hook(lambda module, args, out: forwards.append(len(out)))
    audited(sharp, x, y, **options)
    whole = len(forwards)
    forwards.clear()
    assert audited(sharp, x, y, state=tmp_path, **options).findings == expected.findings
    hook.remove()
    assert len(forwards) < whole / 5


def test_an_audit_of_a_network_whose_code_was_edited_begins_anew(robust: Task, tmp_path: Path) -> None:
    """Its weights and its words are as before: the ascent that several checks read is not taken over either."""
    net, x, y = robust
    audited(planted.Around(net), x, y, "steps", "one_step", state=tmp_path)
    edited = planted.quantised(net)
    expected = audited(edited, x, y, "steps", "one_step")
    assert audited(edited, x, y, "steps", "one_step", state=tmp_path).findings == expected.findings


# ---------------------------------------------------------------- an honest network
def test_honest_network_is_not_accused(robust: Task) -> None:
    net, x, y = robust
    said = audited(net, x, y, variants={})
    assert said.of("fail") == ()
    assert list(said.of("not checked")) == NEEDS_OTHERS
    assert [finding.check for finding in said.findings] == NAMES
    # It is neither robust to everything nor to nothing, so that every check had something to see.
    left = float(said["steps"].measured.split(" leave ")[1].split(" %")[0])
    assert 20 < left < 90
    # Of each finding something is said; what passes asks for nothing.
    for finding in said.findings:
        assert finding.measured, finding.check
        assert finding.threshold, finding.check
        assert finding.meaning, finding.check
        assert bool(finding.todo) == (finding.severity != "pass"), finding.check


def test_everything_given_nothing_found_is_a_pass(robust: Task) -> None:
    net, x, y = robust
    big = {"eps": EPS, "step_size": EPS / 4}
    attacks = {"fgsm": FGSM(eps=EPS), "pgd": PGD(**big, steps=10, iterate="worst")}
    many = x.repeat(3, 1, 1, 1)
    result = evaluate(net, attacks, loader(many, y.repeat(3)), progress=False)
    # AutoAttack would take the test's time: here it is what breaks all that PGD breaks.
    result.attacks["aa"] = result["pgd"].__class__(
        **{**vars(result["pgd"]), "name": "aa", "description": {**AUTO, "eps": EPS}}
    )
    said = audited(
        net,
        many,
        y.repeat(3),
        *(name for name in NAMES if name not in ("restarts", "incomplete", "black_box")),
        result=result,
        training={**HONEST, "attack": {**big, "steps": 10}},
        variants={},
        adaptive=[PGD(**big, steps=10, objective="margin", name="margin")],
    )
    assert set(said.of("not checked")) == {"restarts", "incomplete", "black_box"}
    assert [name for name in NAMES if found(said)[name] not in ("pass", "not checked")] == []
    assert said.verdict == "info"
    done = tuple(finding for finding in said.findings if finding.severity == "pass")
    assert Audit(findings=done).verdict == "pass"


# ---------------------------------------------------------------- planted faults
def gated(net: nn.Module) -> nn.Module:
    masked = copy.deepcopy(net)
    masked.last_conv_gate = planted.Steps()
    return masked


@pytest.mark.parametrize(
    ("plant", "severity", "check", "others"),
    [
        (planted.saturated, "fail", "saturation", ("zero_grad",)),
        (planted.noisy, "fail", "stochastic", ()),
        (planted.quantised, "fail", "zero_grad", ("unbounded",)),
        (planted.rounded, "fail", "zero_grad", ("unbounded",)),
        (planted.detached, "fail", "zero_grad", ()),
        (planted.no_number, "fail", "zero_grad", ("unbounded",)),
        (planted.probabilities, "warn", "softmax", ()),
        (planted.batch_normalised, "fail", "batch_coupled", ()),
        (planted.in_train_mode, "fail", "batch_coupled", ()),
        (gated, "fail", "transfer_failure", ("zero_grad", "unbounded")),
    ],
)
def test_planted_fault_is_named(
    robust: Task,
    plant: Callable[[nn.Module], nn.Module],
    severity: str,
    check: str,
    others: tuple[str, ...],
) -> None:
    net, x, y = robust
    looked = {"softmax", "stochastic", "batch_coupled", "zero_grad", "saturation", "transfer_failure", *others}
    said = audited(plant(net), x, y, *looked, n=30)
    assert said[check].severity == severity
    accused = set(said.of("fail") + said.of("warn"))
    assert accused == {check, *others}
    assert said.verdict == severity


def test_unbounded_is_left_by_neither_objective(robust: Task) -> None:
    """Saturated logits hide the cross-entropy's gradient, not the margin's."""
    net, x, y = robust
    assert found(audited(planted.saturated(net), x, y, "unbounded", n=20, eps=0.5))["unbounded"] == "pass"


def test_mask_that_reads_the_labels_of_the_batch(robust: Task) -> None:
    net, x, y = robust
    masked = planted.labels_by_place(net, y)
    assert (predicted(masked, x) == y).float().mean() > 0.99
    said = audited(masked, x, y, "stochastic", "batch_coupled")
    assert found(said)["batch_coupled"] == "fail"
    assert "in another order" in said["batch_coupled"].measured


def test_masked_gradients_fall_to_square_and_to_an_attack_made_for_them(robust: Task) -> None:
    net, x, y = robust

    def through(served: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """BPDA: the ascent on the network without the step that has no gradient."""
        return pgd(cross_entropy(net, y), x, eps=EPS, step_size=EPS / 4, steps=10, init="zero")

    said = audited(
        planted.quantised(net), x, y, "black_box", "adaptive", queries=150, adaptive={"bpda": Planted(through, eps=EPS)}
    )
    assert found(said)["black_box"] == "fail"
    assert found(said)["adaptive"] == "fail"
    assert "bpda leaves" in said["adaptive"].measured


def test_adaptive_attacks_of_the_evaluation_are_not_standard_ones() -> None:
    """What the training loss breaks alone counts, though it is a row like any other."""
    ours = {"attack": "adaptive", "objective": "training_loss"}
    for alone, severity in ((range(50, 52), "pass"), (range(50, 60), "fail")):
        result = outcomes(200, pgd=(PGD_50, set(range(50))), own=(ours, set(alone)))
        finding = read("adaptive", result=result, n=200)
        assert finding.severity == severity
        assert "own leaves" in finding.measured
    assert read("adaptive", result=outcomes(200, pgd=(PGD_50, set(range(50))))).severity == "not checked"


def test_variant_of_the_caller(robust: Task) -> None:
    net, x, y = robust
    served = planted.quantised(net)
    said = audited(served, x, y, "transfer_failure", variants={"raw": net})
    assert said["transfer_failure"].severity == "fail"
    assert "made on raw" in said["transfer_failure"].measured
    itself = audited(net, x, y, "transfer_failure", variants={"raw": copy.deepcopy(net)})
    assert itself["transfer_failure"].severity == "pass"
    assert audited(net, x, y, "transfer_failure")["transfer_failure"].severity == "not checked"


def test_own_variants_are_found() -> None:
    net = CNNTiny(num_classes=10, in_channels=1, image_size=8, width=0.25)
    assert own_variants(net) == {}
    net.insert_latent(test="sample")
    net.last_conv_gate = planted.Steps()
    variants = own_variants(net)
    assert list(variants) == ["the unmasked network", "the mean network"]
    assert isinstance(variants["the unmasked network"].last_conv_gate, nn.Identity)
    assert variants["the mean network"].latent.test == "mean"
    assert net.latent.test == "sample"
    assert isinstance(net.last_conv_gate, planted.Steps)


def test_noise_that_is_attacked_in_expectation_is_a_warning(robust: Task) -> None:
    net, x, y = robust
    eot = Planted(lambda net, x, y: x)
    eot.describe = lambda: {"attack": "eot_pgd", "name": "eot_20", "eps": EPS, "norm": "linf"}
    said = audited(planted.noisy(net), x, y, "stochastic", adaptive={"eot_20": eot})
    assert said["stochastic"].severity == "warn"
    assert said["stochastic"].todo == "quote eot_20 alone"


# ---------------------------------------------------------------- one pixel, where the ascent is known
PIXEL = torch.full((200, 1, 1, 1), 0.5), torch.zeros(200, dtype=torch.long)


@pytest.mark.parametrize(
    ("height", "options", "expected"),
    [
        # A peak at 0.6 that a step of 2 eps jumps over, to and fro; wrong within 0.5 of it. One step ends right of it
        # from most starts, four end left of it.
        (lambda u: 0.5 - (u - 0.6).abs(), {"steps": 1}, {"steps": "fail"}),
        (lambda u: 0.5 - (u - 0.6).abs(), {"steps": 2}, {"silent_success": "warn"}),
        # A valley at 0.5: from three starts in four the ascent ends left, where it is wrong, else right.
        (lambda u: (u - 0.5).abs() - 1, {"steps": 2, "restarts": 10}, {"restarts": "warn", "steps": "pass"}),
        # A slope: steps of eps / 16 have not come far.
        (lambda u: u - 0.7, {"steps": 4, "step_size": EPS / 16}, {"steps": "warn", "silent_success": "pass"}),
        (lambda u: u - 1.2, {"steps": 10, "step_size": EPS / 16}, {"incomplete": "warn", "steps": "pass"}),
        (lambda u: u - 1.2, {"steps": 10, "step_size": EPS / 4}, {"incomplete": "pass", "steps": "pass"}),
        # Wrong only close by: an ascent that has more room steps over it.
        (lambda u: torch.where(u < 0.8, u - 0.1, u / 10 - 2), {}, {"unbounded": "fail"}),
        # Never wrong, and wrong with room enough.
        (lambda u: u - 20, {}, {"unbounded": "fail"}),
        (lambda u: u - 0.7, {}, {"unbounded": "pass"}),
        # FGSM, from the image itself, ends at eps; the ascent of long steps goes to and fro and ends elsewhere.
        (lambda u: 0.5 - (u - 0.6).abs(), {"steps": 4}, {"one_step": "fail"}),
        # Downhill from the image, and a hill beyond: one step finds nothing.
        (lambda u: torch.where(u < 0.2, -u - 2, 6 * u - 3.2), {"steps": 4}, {"one_step": "warn"}),
    ],
)
def test_ascents_of_one_pixel(height: Callable, options: dict, expected: dict[str, str]) -> None:
    x, y = PIXEL
    net = planted.OnePixel(EPS, height)
    assert bool((predicted(net, x) == 0).all())
    said = audited(net, x, y, *expected, n=200, **{"step_size": 2 * EPS, **options})
    assert {name: found(said)[name] for name in expected} == expected, [f.measured for f in said.findings]


# ---------------------------------------------------------------- what it reads
AUTO = {"attack": "autoattack", "attacks": ["apgd-ce", "apgd-t", "fab-t", "square"], "norm": "linf"}
HONEST = {
    "terms": {
        "share/ce": {"min": 0.5, "mean": 0.8, "max": 1.0},
        "share/kl": {"min": 0.0, "mean": 0.2, "max": 0.5},
        "gradient/ce": {"min": 0.5, "mean": 0.7, "max": 1.0},
        "gradient/kl": {"min": 0.0, "mean": 0.4, "max": 0.8},
    },
    "validation": 50.0,
    "validation_last": 48.0,
    "selected_on": "validation",
}


def outcomes(n: int, *, clean_wrong: int = 0, **attacks: tuple[dict, set[int]]) -> EvaluationResult:
    """Outcomes of n samples of class 0: the last few are wrong when clean; per attack a description and what fell."""
    label = torch.zeros(n, dtype=torch.long)
    clean = (torch.arange(n) >= n - clean_wrong).long()

    def row(name: str, description: dict, fallen: set[int]) -> AttackResult:
        count = description.pop("n", n)
        prediction = clean.clone()[:count]
        prediction[sorted(fallen)] = 1
        return AttackResult(
            name=name,
            description={"eps": EPS, "norm": "linf", **description},
            label=label[:count],
            prediction=prediction,
            distance=torch.zeros(count),
            flags=tuple(description.pop("flags", ())),
        )

    return EvaluationResult(
        index=torch.arange(n),
        label=label,
        clean=row("clean", {}, set()),
        attacks={name: row(name, dict(description), fallen) for name, (description, fallen) in attacks.items()},
        num_classes=2,
        seed=0,
        batch_size=n,
    )


def read(check: str, **given: Any) -> Finding:
    x, y = PIXEL
    return audited(planted.OnePixel(EPS, lambda u: u - 2), x, y, check, **given)[check]


PGD_50 = {"attack": "pgd", "steps": 50, "step_size": EPS / 4, "restarts": 1}


@pytest.mark.parametrize(
    ("pgd_breaks", "auto_breaks", "severity"),
    [
        (range(100), range(100), "pass"),
        (range(104), range(100), "pass"),  # 4 of 1,800: 0.22 points
        (range(108), range(100), "fail"),
        (range(104), range(200, 300), "fail"),  # not the difference of two accuracies: what PGD alone breaks
    ],
)
def test_subsumption(pgd_breaks: range, auto_breaks: range, severity: str) -> None:
    result = outcomes(2000, clean_wrong=200, pgd=(PGD_50, set(pgd_breaks)), aa=(AUTO, set(auto_breaks)))
    finding = read("subsumption", result=result)
    assert finding.severity == severity
    assert "union" in finding.measured


def test_subsumption_counts_beyond_two_standard_errors_only() -> None:
    """3 of 100 are 3 points, and 2 standard errors are 3.4."""
    few = outcomes(100, pgd=(PGD_50, {0, 1, 2}), aa=(AUTO, set()))
    assert read("subsumption", result=few).severity == "pass"
    assert read("subsumption", result=outcomes(100, pgd=(PGD_50, set(range(6))), aa=(AUTO, set()))).severity == "fail"
    other_ball = outcomes(100, pgd=({**PGD_50, "eps": EPS / 2}, set(range(6))), aa=(AUTO, set()))
    assert read("subsumption", result=other_ball).severity == "not checked"


def test_subsumption_is_over_the_samples_that_both_ran_on() -> None:
    beyond, auto = (PGD_50, set(range(500, 600))), ({**AUTO, "n": 500}, set())
    assert read("subsumption", result=outcomes(2000, pgd=beyond, aa=auto)).severity == "pass"
    on_fewer = ({**PGD_50, "n": 100}, set(range(100)))
    assert read("subsumption", result=outcomes(2000, few=on_fewer, pgd=beyond, aa=auto)).severity == "pass"
    assert read("subsumption", result=outcomes(2000, few=on_fewer, aa=auto)).severity == "not checked"


@pytest.mark.parametrize(("by_square", "severity"), [(range(40), "pass"), (range(60), "pass"), (range(80), "fail")])
def test_black_box_of_the_evaluation(by_square: range, severity: str) -> None:
    """40 fell to PGD, 12 points of the others count; nothing can be tried again on samples that are not at hand."""
    square = {"attack": "autoattack", "attacks": ["square"]}
    result = outcomes(2000, pgd=(PGD_50, set(range(40))), square=(square, set(by_square)))
    finding = read("black_box", result=result)
    assert finding.severity == severity
    assert finding.measured.startswith("square:")


def test_what_a_better_ascent_finds_is_not_masked() -> None:
    """Long steps jump over a narrow peak: the audit's ascents are weak there, but APGD shortens its steps."""
    x, y = PIXEL
    net = planted.OnePixel(EPS, lambda u: 0.3 - (u - 0.6).abs())
    result = outcomes(200, vgg=({"attack": "transfer"}, set(range(200))))
    said = audited(net, x, y, "black_box", result=result, n=200, steps=4, step_size=2 * EPS)
    assert said["black_box"].severity == "pass"
    assert read("black_box", result=result, n=200).severity == "fail"


def test_black_box_on_mnist() -> None:
    square = {"attack": "transfer", "name": "vgg"}
    for fallen, severity in ((60, "info"), (90, "fail")):
        result = outcomes(2000, pgd=(PGD_50, set()), vgg=(square, set(range(200, 200 + fallen))))
        assert read("black_box", result=result, dataset="mnist").severity == severity
        assert read("black_box", result=result).severity == "fail"


@pytest.mark.parametrize(
    ("fgsm", "pgd_50", "severity"),
    [(100, 300, "pass"), (130, 100, "fail"), (115, 100, "pass"), (100, 580, "pass"), (100, 620, "warn")],
)
def test_one_step_of_the_evaluation(fgsm: int, pgd_50: int, severity: str) -> None:
    result = outcomes(2000, fgsm=({"attack": "fgsm"}, set(range(fgsm))), pgd=(PGD_50, set(range(pgd_50))))
    assert read("one_step", result=result).severity == severity


def test_reach() -> None:
    x, y = images(20, low=0.2, high=0.8), torch.zeros(20, dtype=torch.long)
    attacks = {"pgd": PGD(eps=EPS, step_size=EPS / 80, steps=20)}
    short = evaluate(Halfspace(), attacks, loader(x, y), progress=False)
    finding = read("reach", result=short)
    assert finding.severity == "warn"
    assert finding.measured == f"pgd: 20 steps of {EPS / 80} for eps {EPS}"
    enough = {"norm": "linf", "eps": "8/255", "step_size": "2/255", "steps": 4}
    assert read("reach", training={"attack": enough}).severity == "pass"
    assert read("reach", training={"attack": {**enough, "steps": 3}}).severity == "warn"
    assert read("reach").severity == "not checked"


def test_n_small() -> None:
    assert read("n_small", result=outcomes(1000)).severity == "pass"
    finding = read("n_small", result=outcomes(1000, aa=({**AUTO, "n": 999}, set())))
    assert (finding.severity, finding.measured) == ("info", "images: aa 999")


def test_n_small_where_hardly_an_image_is_right() -> None:
    """The other checks would pass for want of images; the verdict is no pass."""
    (x, y), net = PIXEL, planted.OnePixel(EPS, lambda u: u - 2)
    for right, told in ((19, True), (20, False)):
        labels = torch.where(torch.arange(len(y)) < right, y, 1 - y)
        finding = audited(net, x, labels, "n_small", result=outcomes(1000))["n_small"]
        assert finding.severity == ("info" if told else "pass")
        assert (finding.measured == "19 of the 60 images looked at are right when clean") is told


@pytest.mark.parametrize(
    ("training", "check", "severity"),
    [
        (HONEST, "terms", "pass"),
        ({**HONEST, "terms": {}}, "terms", "pass"),
        ({}, "terms", "not checked"),
        ({"validation": 50.0, "validation_last": 46.9}, "overfit", "warn"),
        ({"validation": 50.0, "validation_last": 47.1}, "overfit", "pass"),
        ({"validation": 50.0}, "overfit", "not checked"),
        ({"selected_on": "validation"}, "selection", "pass"),
        ({"selected_on": "nothing"}, "selection", "pass"),
        ({"selected_on": "test"}, "selection", "fail"),
        ({"selected_on": None}, "selection", "not checked"),
    ],
)
def test_notes_of_the_training(training: dict, check: str, severity: str) -> None:
    assert read(check, training=training).severity == severity


def history(share: float, gradient: float, largest: float) -> dict[str, dict[str, float]]:
    """Of a loss whose second term has these means, and at most `largest` of both."""
    return {
        "share/ce": {"min": 0.0, "mean": 1 - share, "max": 1.0},
        "share/mi": {"min": 0.0, "mean": share, "max": largest},
        "gradient/ce": {"min": 0.0, "mean": 1.0, "max": 1.0},
        "gradient/mi": {"min": 0.0, "mean": gradient, "max": largest},
    }


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        (history(0.2, 0.2, 0.5), None),
        (history(1e-5, 1e-5, 9e-4), "mi is inert"),
        (history(1e-5, 1e-5, 2e-3), "ce dominates"),  # it had a say once
        (history(0.04, 0.04, 0.5), "ce dominates"),
        (history(0.04, 0.06, 0.5), None),  # small in value, but it steers
    ],
)
def test_terms(terms: dict, said: str | None) -> None:
    finding = read("terms", training={"terms": terms})
    assert finding.severity == ("pass" if said is None else "warn")
    if said is not None:
        assert said in finding.measured
        assert ("inert" in finding.measured) == ("inert" in said)


def test_notes_of_a_run() -> None:
    config = {"attack": {"norm": "linf", "eps": 0.1, "steps": 1, "step_size": 0.1}, "dataset": {"val_size": 0}}
    assert training_notes(config, {"rule": "best"}, None)["selected_on"] == "test"
    config["dataset"]["val_size"] = 100
    notes = training_notes(config, {"rule": "best"}, {"validation": 1.0})
    assert notes == {"validation": 1.0, "attack": config["attack"], "selected_on": "validation"}
    assert training_notes(config, {"rule": "last"}, {})["selected_on"] == "nothing"
    assert "selected_on" not in training_notes({}, {"rule": "file"}, {})


# ---------------------------------------------------------------- what it promises
def test_adaptive_is_asked_for(robust: Task) -> None:
    net, x, y = robust
    finding = audited(net, x, y, "adaptive")["adaptive"]
    assert finding.severity == "not checked"
    assert "training loss" in finding.todo


def test_verdict() -> None:
    def of(*severities: str) -> str:
        told = [
            Finding(check=str(n), severity=s, measured="", threshold="", meaning="") for n, s in enumerate(severities)
        ]
        return Audit(findings=tuple(told)).verdict

    assert of("pass", "pass") == "pass"
    assert of("pass", "not checked") == "info"
    assert of("info", "pass") == "info"
    assert of("not checked", "warn", "info") == "warn"
    assert of("warn", "fail", "pass") == "fail"
    assert of() == "info"
    with pytest.raises(ValueError, match="severity='fine': expected one of fail, warn"):
        of("fine")


def test_points_are_paired() -> None:
    a, b = torch.arange(400) < 40, torch.arange(400) < 30
    assert points(a, b).value == pytest.approx(2.5)
    assert points(a, b).error == pytest.approx(100 * (10 / 400 * (1 - 10 / 400) / 400) ** 0.5)
    assert points(b, a).value == pytest.approx(-2.5)
    assert share(a).value == pytest.approx(10.0)
    crossing = points(torch.arange(400) < 40, (torch.arange(400) >= 360))
    assert crossing.value == 0
    assert crossing.error == pytest.approx(100 * (80 / 400 / 400) ** 0.5)


def test_what_needs_gradients() -> None:
    assert kind({"attack": "fgsm"}) == kind({"attack": "autoattack", "attacks": ["apgd-ce"]}) == "gradient"
    assert kind(AUTO) == "both"
    assert kind({"attack": "transfer"}) == kind({"attack": "ti_dim", "surrogate": "vgg19"}) == "black box"


def test_same_seed_same_findings_and_the_network_is_as_before(robust: Task) -> None:
    net, x, y = copy.deepcopy(robust[0]).train(), robust[1], robust[2]
    next(net.parameters()).requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    noisy = planted.noisy(net)
    only = [name for name in NAMES if name not in ("unbounded", "black_box")]

    def state() -> dict[str, Any]:
        return {
            "modes": [module.training for module in net.modules()],
            "requires_grad": [p.requires_grad for p in net.parameters()],
            "weights": [p.tolist() for p in net.parameters()],
            "grad": net.head.weight.grad.tolist(),
            "hooks": len(noisy._forward_hooks),
            "torch": torch.get_rng_state().tolist(),
            "python": random.getstate(),
        }

    before = state()
    first = audited(noisy, x, y, *only, n=20, steps=3)
    assert state() == before
    torch.manual_seed(5)
    with torch.inference_mode():
        second = audited(noisy, x.clone(), y.clone(), *only, n=20, steps=3, batch_size=50)
    assert first.plain()["findings"] == second.plain()["findings"]
    other = audited(noisy, x, y, *only, n=20, steps=3, seed=1)
    assert first.plain()["findings"] != other.plain()["findings"]


def test_findings_do_not_depend_on_the_batch_size(robust: Task) -> None:
    net, x, y = robust
    only = ("steps", "silent_success", "restarts", "one_step")
    small, large = (audited(net, x, y, *only, n=30, batch_size=size) for size in (7, 100))
    assert found(small) == found(large)
    assert small["steps"].measured == large["steps"].measured


def test_plain_values_are_json(robust: Task) -> None:
    net, x, y = robust
    plain = audited(net, x, y, "softmax").plain()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["settings"]["right"] <= plain["settings"]["n"] == 60
    assert plain["verdict"] == "info"


def test_progress_is_a_line_per_check(robust: Task, capsys: pytest.CaptureFixture[str]) -> None:
    net, x, y = robust
    audited(net, x, y, "softmax", progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(CHECKS)
    assert lines[NAMES.index("softmax")].startswith(f"audit {NAMES.index('softmax') + 1}/{len(NAMES)} softmax: pass")


def test_a_check_that_fails_says_why_and_stops_no_other(robust: Task) -> None:
    _, x, y = robust

    class Stubborn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                raise RuntimeError("no gradients here")
            return torch.nn.functional.one_hot((x.flatten(1).sum(dim=1) > 20).long(), 10).float()

    said = audited(Stubborn(), x, torch.zeros_like(y), "softmax", "steps", "zero_grad")
    assert said["steps"].severity == "not checked"
    assert said["steps"].measured == "RuntimeError: no gradients here"
    assert said["softmax"].severity == "warn"


def test_nothing_right_is_not_checked(robust: Task) -> None:
    net, x, y = robust
    said = audited(net, x, (y + 1) % 10, "zero_grad", "steps", "black_box", "unbounded", n=10)
    assert {found(said)[name] for name in ("zero_grad", "steps", "black_box", "unbounded")} == {"not checked"}
    assert "none of the samples right" in said["steps"].measured


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0}, "eps=0: expected a radius above 0"),
        ({"eps": 8}, "did you mean 8/255"),
        ({"n": 0}, "n=0: expected 1 or more"),
        ({"steps": 0}, "steps=0: expected 1 or more"),
        ({"only": ["reach", "reech"]}, r"only=\['reech'\]: expected names of checks, n_small, reach"),
        ({"ids": torch.arange(3)}, "3 ids: expected as many"),
        ({"norm": "l1"}, "norm='l1'"),
    ],
)
def test_bad_input(robust: Task, options: dict, message: str) -> None:
    net, x, y = robust
    with pytest.raises(ValueError, match=message):
        audited(net, x, y, **{"only": ["softmax"], **options})


# ---------------------------------------------------------------- more honest networks
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "eps", "norm"),
    [({}, 0.0, "linf"), ({"batch_norm": True}, EPS, "linf"), ({"activation": "swish"}, EPS, "linf"), ({}, EPS, "l2")],
)
def test_other_honest_networks_are_not_accused(options: dict, eps: float, norm: str) -> None:
    """Naturally trained, with batch norm, without kinks, in another ball than the one it was trained for."""
    digits = Digits(batch_size=64, val_size=0)
    train, test = digits.read("train"), digits.read("test")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = CNNTiny(num_classes=10, in_channels=1, image_size=8, width=0.5, **options)
    net = adversarially_trained(net, train.x.float() / 255, train.y, eps=eps, epochs=8, steps=3 if eps else 0)
    radius = 1.0 if norm == "l2" else EPS
    said = audited(net, test.x.float() / 255, test.y, eps=radius, norm=norm, variants={}, steps=20, queries=200)
    assert said.of("fail") == (), [finding for finding in said.findings if finding.severity == "fail"]


@pytest.mark.slow
@pytest.mark.realdata("mnist")
def test_honest_network_on_mnist_is_not_accused(data_root: Path) -> None:
    data = MNIST(root=str(data_root), batch_size=64, val_size=0)
    train, test = data.read("train"), data.read("test")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = CNNTiny(num_classes=10, in_channels=1, image_size=28, width=0.5)
    x, y = train.x[:3000].float() / 255, train.y[:3000]
    net = adversarially_trained(net, x, y, eps=0.2, epochs=8, steps=5)
    x, y = test.x[:100].float() / 255, test.y[:100]
    said = audited(net, x, y, eps=0.2, n=100, steps=20, queries=300, variants={}, dataset="mnist")
    left = float(said["steps"].measured.split(" leave ")[1].split(" %")[0])
    assert 20 < left < 98
    assert said.of("fail") == (), [finding for finding in said.findings if finding.severity == "fail"]
