"""Wrong signs, factors and omissions that some test must notice, and what plants them in turn.

`make mutants` (ARGS="namid trades" for those of some files) copies the checkout into a temporary folder, makes one
replacement at a time and runs the tests that stand beside it, up to the first that fails. None may pass. (That the
same tests pass without it is what `make test` shows.)
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
WITHOUT = "not slow and not ddp and not realdata"


@dataclass(frozen=True)
class Mutant:
    """One replacement.

    Attributes:
        file: below mi_at/.
        right, wrong: what stands there once, and what is put in its place.
        tests: below tests/, of which one must fail: files, or one test of a file as pytest names it.
    """

    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.right.split())} -> {' '.join(self.wrong.split()) or 'nothing'}"


# file: [(right, wrong, tests), ...]
LIST: dict[str, list[tuple[str, str, str]]] = {
    "attacks/pgd.py": [
        ("x_adv + per_sample(step_size, x)", "x_adv - per_sample(step_size, x)", "attacks/test_pgd_reference.py"),
    ],
    "callbacks/adversarial_weight_perturbation.py": [
        ("return self.gamma * weight", "return -self.gamma * weight", "callbacks/test_awp.py"),
    ],
    "defenses/alp.py": [
        (
            "pairing = alpha * (logits_adv - logits)",
            "pairing = alpha * (logits_adv + logits)",
            "defenses/test_losses.py",
        ),
        ("pairing = alpha *", "pairing = -alpha *", "defenses/test_losses.py"),
    ],
    "defenses/mart.py": [
        ("error = 1.0000001 - p", "error = 1.0000001 + p", "defenses/test_losses.py"),
        ("kl = beta * (divergence", "kl = -beta * (divergence", "defenses/test_losses.py"),
        ("log_p - torch.log", "log_p + torch.log", "defenses/test_losses.py"),
    ],
    "defenses/mi_estimators.py": [
        ('n[ADVERSARIAL].relu() - n["clean"]', 'n["clean"] - n[ADVERSARIAL].relu()', "defenses/test_mi_estimators.py"),
        ('a["clean"].relu() - a[ADVERSARIAL]', 'a["clean"] - a[ADVERSARIAL]', "defenses/test_mi_estimators.py"),
        ("-selected_mean(estimates, broken)", "-estimates.mean()", "defenses/test_mi_estimators.py"),
    ],
    "defenses/mimae.py": [
        ('terms["mi"] = -lambda_mi', 'terms["mi"] = lambda_mi', "defenses/test_losses.py"),
        ("logits_adv - logits\n", "logits_adv + logits\n", "defenses/test_losses.py"),
        (
            "joint_distribution(logits.softmax(dim=1), logits_adv.softmax(dim=1))",
            "joint_distribution(logits.softmax(dim=1), logits.softmax(dim=1))",
            "defenses/test_losses.py",
        ),
    ],
    "defenses/mma.py": [
        ("((1 - right) * cross", "((1 + right) * cross", "defenses/test_losses.py"),
        ("at_boundary + ce * ~right", "at_boundary - ce * ~right", "defenses/test_mma.py defenses/test_losses.py"),
        ("margin = (1 - clean_weight)", "margin = (1 + clean_weight)", "defenses/test_mma.py defenses/test_losses.py"),
    ],
    "defenses/shared_info.py": [
        ("-lambda_mi * information", "lambda_mi * information", "defenses/test_shared_info.py"),
        ('terms["dskl"] = beta *', 'terms["dskl"] = -beta *', "defenses/test_shared_info.py"),
        ('terms["ce_clean"] = (1 - alpha)', 'terms["ce_clean"] = (1 + alpha)', "defenses/test_shared_info.py"),
        ("(epoch - hold) / rise", "(epoch + hold) / rise", "defenses/test_shared_info.py"),
    ],
    "defenses/trades.py": [
        ('ce_view == "clean" else logits_adv', 'ce_view != "clean" else logits_adv', "defenses/test_losses.py"),
        ("kl = beta *", "kl = -beta *", "defenses/test_losses.py"),
        ("kl_divergence(logits, logits_adv)", "kl_divergence(logits_adv, logits)", "defenses/test_losses.py"),
        ('if self.attack_objective == "ce"', 'if self.attack_objective != "ce"', "defenses/test_defenses.py"),
        ("beta=self.beta, ce_view=self.ce_view", "beta=self.beta", "defenses/test_defenses.py"),
    ],
    "defenses/vib.py": [
        ('terms["rate"] = beta', 'terms["rate"] = -beta', "defenses/test_vib.py"),
    ],
    "estimators/local_dim.py": [
        ("self.deep(x) + self.shortcut(x)", "self.deep(x) - self.shortcut(x)", "estimators/test_local_dim.py"),
        ("fill_diagonal_(1.0)", "fill_diagonal_(0.0)", "estimators/test_local_dim.py"),
        ("gradient / world_size()", "gradient * world_size()", "estimators/test_local_dim.py"),
    ],
    "estimators/mige.py": [
        ("return -vectors @", "return vectors @", "estimators/test_mige.py"),
        ("((joint - apart) * both)", "((apart - joint) * both)", "estimators/test_mige.py"),
        ("@ x) / variance", "@ x) / variance.sqrt()", "estimators/test_mige.py"),
    ],
    "estimators/mine.py": [
        ("torch.autograd.grad(-bound", "torch.autograd.grad(bound", "estimators/test_mine.py"),
        ("cycle.roll(1)", "cycle", "estimators/test_mine.py"),
    ],
    "evaluation/robust_ncmi.py": [
        ("            x_adv = search.best_x.clone()\n", "", "evaluation/test_robust_ncmi.py"),
    ],
    "functional/divergences.py": [
        (
            "-torch.log(1.0001 - largest_other",
            "torch.log(1.0001 - largest_other",
            "functional/test_divergences.py defenses/test_losses.py",
        ),
        (
            "(log_p - log_q)).sum(dim=1), reduction)",
            "(log_q - log_p)).sum(dim=1), reduction)",
            "functional/test_divergences.py",
        ),
        ("sigma / sigma2 - sigma2 / sigma", "sigma / sigma2 + sigma2 / sigma", "functional/test_divergences.py"),
        ("spread + shift", "spread - shift", "functional/test_divergences.py"),
        (
            "sigma.square() - 1 - 2 * sigma.log()",
            "sigma.square() - 1 + 2 * sigma.log()",
            "functional/test_divergences.py",
        ),
    ],
    "functional/information.py": [
        (
            "total = ((sums - sums.sum(dim=0)) * log_sums)",
            "total = ((sums.sum(dim=0) - sums) * log_sums)",
            "functional/test_cmi.py",
        ),
        ("counts.square().sum()).clamp_min(1)", "counts.sum()).clamp_min(1)", "functional/test_cmi.py"),
        ("return total / len(probs) ** 2", "return total / len(probs)", "functional/test_cmi.py"),
        (".log() - centroids.clamp_min(tiny)", ".log() + centroids.clamp_min(tiny)", "functional/test_cmi.py"),
        ("log_probs.detach() if detach_log else log_probs", "log_probs", "functional/test_cmi.py"),
        ("joint + joint.T", "joint - joint.T", "functional/test_information.py"),
        (
            "- rows.clamp_min(tiny).log() - columns",
            "- rows.clamp_min(tiny).log() + columns",
            "functional/test_information.py",
        ),
    ],
    "functional/kernels.py": [
        (
            "squared = squared_distances(x.detach())",
            "squared = squared_distances(x)",
            "defenses/test_shared_info.py functional/test_kernels.py",
        ),
        ("(m - 1) ** 2", "(m + 1) ** 2", "functional/test_kernels.py"),
        ("torch.exp(-squared_distances", "torch.exp(squared_distances", "functional/test_kernels.py"),
        ("kernel - kernel.mean(dim=-1", "kernel + kernel.mean(dim=-1", "functional/test_kernels.py"),
        ("- 2 * products", "+ 2 * products", "functional/test_kernels.py"),
        ("factor.square().sum() - eps * m", "factor.square().sum() + eps * m", "functional/test_kernels.py"),
    ],
    "functional/margins.py": [
        ("largest_other(logits, y) - logits", "largest_other(logits, y) + logits", "functional/test_margins.py"),
        ("top[:, 0] - top[:, 2]", "top[:, 0] - top[:, 1]", "functional/test_margins.py"),
    ],
    "functional/selection.py": [
        ("(logits_adv.argmax(dim=1) != y)", "(logits_adv.argmax(dim=1) == y)", "functional/test_variational.py"),
        (".sum() >= 2)", ".sum() >= 1)", "functional/test_variational.py regularizers/test_namid.py"),
    ],
    "functional/variational.py": [
        ("joint.mean() - (marginal", "joint.mean() + (marginal", "functional/test_variational.py"),
        ("math.log(len(marginal))", "math.log(len(marginal) + 1)", "functional/test_variational.py"),
        ("math.log(len(scores) - 1)", "math.log(len(scores))", "functional/test_variational.py"),
        ("(_diagonal(scores) - others).mean", "(others - _diagonal(scores)).mean", "functional/test_variational.py"),
        ("scores.logsumexp(dim=1)).mean() +", "scores.logsumexp(dim=0)).mean() +", "functional/test_variational.py"),
        (".mean() + math.log(len(scores))", ".mean() - math.log(len(scores))", "functional/test_variational.py"),
        ("masked_fill(own, -math.inf)", "masked_fill(own, 0)", "functional/test_variational.py"),
    ],
    "regularizers/clean_ncmi.py": [
        ('views.logits("clean"), views.y', '-views.logits("clean"), views.y', "regularizers/test_ncmi.py"),
        ("ctx.draw_per_class(self.samples_per_class)", "ctx.draw_per_class(1)", "regularizers/test_ncmi.py"),
    ],
    "regularizers/hbar.py": [
        ('"hsic_y": -self.weights', '"hsic_y": self.weights', "regularizers/test_hbar.py"),
        ('{"hsic_x": self.weights', '{"hsic_x": -self.weights', "regularizers/test_hbar.py"),
    ],
    "regularizers/ib_rar.py": [
        (
            '"at_test": not self.mask.at_test',
            '"at_test": self.mask.at_test',
            "test_train.py::test_ib_rar_is_recorded_with_and_without_its_mask",
        ),
        (
            'or self.mask.applied == "refresh":\n            return {}',
            "and False:\n            return {}",
            "test_train.py::test_a_mask_that_is_never_at_test_leaves_one_record",
        ),
        ('"hsic_y": -self.weights', '"hsic_y": self.weights', "regularizers/test_ib_rar.py"),
        ('{"hsic_x": self._alpha(m)', '{"hsic_x": -self._alpha(m)', "regularizers/test_ib_rar.py"),
        ("channel_mask(-channel_dependence", "channel_mask(channel_dependence", "regularizers/test_ib_rar.py"),
        ("BATCH / m if", "m / BATCH if", "regularizers/test_ib_rar.py"),
    ],
    "regularizers/mi.py": [
        ('{"mi": -self.lambda_mi', '{"mi": self.lambda_mi', "regularizers/test_mi.py"),
    ],
    "regularizers/namid.py": [
        ("torch.where(known, 1 - cosine, 0)", "torch.where(known, 1 + cosine, 0)", "regularizers/test_namid.py"),
        ('zero) - means.get("natural"', 'zero) + means.get("natural"', "regularizers/test_namid.py"),
        ("alpha * lambda_mi * moved", "-alpha * lambda_mi * moved", "regularizers/test_namid.py"),
        ("alpha * lambda_mi * moved", "lambda_mi * moved", "regularizers/test_namid.py"),
        (
            'means["adversarial"] = means["adversarial"].relu()',
            'means["adversarial"] = means["adversarial"]',
            "regularizers/test_namid.py",
        ),
        (
            'views.images("adversarial") - images, outputs',
            'images - views.images("adversarial"), outputs',
            "regularizers/test_namid.py",
        ),
        (
            "natural = self._estimates(self.natural",
            "natural = self._estimates(self.adversarial",
            "regularizers/test_namid.py",
        ),
    ],
    "regularizers/ncmi.py": [
        ('terms["con"] = alpha * (probs', 'terms["con"] = -alpha * (probs', "regularizers/test_ncmi.py"),
        ('terms["sep"] = -beta *', 'terms["sep"] = beta *', "regularizers/test_ncmi.py"),
        (
            "moved = tau * self.centroids + (1 - tau) * means",
            "moved = tau * means + (1 - tau) * self.centroids",
            "regularizers/test_ncmi.py",
        ),
        ("counts.unsqueeze(1) > 0, moved", "counts.unsqueeze(1) >= 0, moved", "regularizers/test_ncmi.py"),
        ("log_centroids[y]))", "log_centroids[0]))", "regularizers/test_ncmi.py"),
        (
            "torch.minimum(tau, (1 + t) / (10 + t))",
            "torch.minimum(tau, (1 + t) / (9 + t))",
            "regularizers/test_ncmi.py",
        ),
    ],
    "regularizers/ncmi_relaxed.py": [
        (
            "ctx.epoch < ctx.scaled(self.warmup_epochs)",
            "ctx.epoch <= ctx.scaled(self.warmup_epochs)",
            "regularizers/test_ncmi.py",
        ),
        ("self.batch_factor * self.batch_size, False", "self.batch_size, False", "regularizers/test_ncmi.py"),
        ("                self._start(ctx)\n", "                pass\n", "regularizers/test_ncmi.py"),
    ],
    "regularizers/wmim.py": [
        (
            '{"wmim": -self.lambda_mi * information}',
            '{"wmim": self.lambda_mi * information}',
            "regularizers/test_wmim.py",
        ),
    ],
}
MUTANTS = [
    Mutant(file, right, wrong, tuple(tests.split())) for file, made in LIST.items() for right, wrong, tests in made
]


def plant(mutant: Mutant, tree: Path) -> str:
    """Make the replacement; the text that stood there before."""
    path = tree / "mi_at" / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.right, mutant.wrong))
    return text


def is_caught(mutant: Mutant, tree: Path) -> bool:
    """Whether a test of the planted tree fails.

    Raises:
        RuntimeError: the tests cannot be run.
    """
    text = plant(mutant, tree)
    try:
        child = os.fork()  # with all that is slow to import, and nothing of mi_at
        if child == 0:
            os._exit(_tests_of(mutant, tree))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        (tree / "mi_at" / mutant.file).write_text(text)
    if code not in (0, 1):
        raise RuntimeError(f"{mutant}: pytest ended with {code}: do {', '.join(mutant.tests)} pass without it?")
    return code == 1


def _tests_of(mutant: Mutant, tree: Path) -> int:
    import pytest

    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path.insert(0, str(tree))
    files = [f"tests/{name}" for name in mutant.tests]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", WITHOUT, *files]))


def checkout(folder: Path) -> Path:
    """A copy of what git tracks or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPO,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO / name, folder / name)
    return folder


def main(words: Sequence[str]) -> None:
    """Plant all mutants, or those of files whose names hold one of the words; exit 1 if one survives."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.file for word in words)]
    if not chosen:
        sys.exit(f"no mutant of {', '.join(words)}: expected words in the names of {', '.join(LIST)}")
    # Imported before the forks; mi_at itself is not, for every child has its own.
    import numpy  # noqa: F401
    import pyautoattack  # noqa: F401
    import pytest  # noqa: F401
    import pytorch_lightning  # noqa: F401
    import scipy.optimize  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch
    import torchmetrics  # noqa: F401

    torch.set_num_threads(1)
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != REPO]
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        tree = checkout(Path(name))
        for number, mutant in enumerate(chosen, 1):
            start = time.monotonic()
            caught = is_caught(mutant, tree)
            survivors += [] if caught else [mutant]
            how = "caught  " if caught else "SURVIVED"
            print(f"{number:>4} of {len(chosen)}  {how} {time.monotonic() - start:4.0f} s  {mutant}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    if survivors:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
