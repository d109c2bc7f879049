"""namid: raise natural and lower adversarial mutual information of adversarial samples, as frozen estimators see it.

Paper: Zhou et al., Improving adversarial robustness via mutual information estimation (NAMID), ICML 2022, eq. 6-9.
L + alpha (cos_n + cos_a + lambda (E_a(x~') - E_n(x~'))), over the samples x' that are right as they are and wrong under
attack; cos = 1 - cosine between the vectors of the selected samples' information, clean against adversarial.
E_n pairs logits with the image x, E_a with the noise x~ - x; both are trained beforehand (`defense=mi_estimators`) and
frozen, in eval mode. The negatives of an estimate are all other images of the global batch.

Differences from the paper: the sign of the lambda term is that of eq. 7 and the abstract (eq. 8 as printed lowers
natural information); the information that is driven down is hinged at 0, as the positive part of its mean, without
which the term has no lower bound (`lambda_term=paper`); the cosine is one of the batch, for that of two numbers is
constant.
Differences from the authors' code: it has no lambda term (`lambda_term=off`); its argmax over the batch in place of the
classes is not kept; a sample's own patches are left out of its negatives (its masked diagonal adds exp 0); one forward
per view in place of seven; no epochs of natural training before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mi_at.estimators.local_dim import LocalDIM, critic_of, pair_scores
from mi_at.functional.distributed import gather
from mi_at.functional.selection import broken_by_attack, selected_cosine, selected_mean
from mi_at.functional.variational import local_donsker_varadhan
from mi_at.regularizers.base import Context, Regularizer, Views

LAMBDA_TERMS = ("clipped", "paper", "off")
SELECTIONS = ("current", "reference")
OBJECTIVES = ("eq5", "eq4", "eq4_selected", "released")
INFORMATION = ("both", "natural", "adversarial")
AUTO = "auto"


def namid_loss(
    natural: Mapping[str, Tensor],
    adversarial: Mapping[str, Tensor],
    selected: Tensor,
    *,
    alpha: float,
    lambda_mi: float,
    lambda_term: str = "clipped",
    information: str = "both",
) -> dict[str, Tensor]:
    """alpha (cos_n + cos_a + lambda (E_a(x~') - E_n(x~'))) (eq. 8-9).

    Args:
        natural: "clean" and "adversarial" -> [B] natural information of that view's logits, nats.
        adversarial: the same of the adversarial information.
        selected: [B] bool (eq. 6).
        alpha: weight, >= 0.
        lambda_mi: weight, >= 0.
        lambda_term: "clipped", "paper" (no hinge) or "off".
        information: "both", or the one that is left ("natural", "adversarial") where the other is removed (Figure 5).

    Returns:
        {"cosine_natural", "cosine_adversarial", "information"}: weighted scalars; the last only where it is in use.
        With fewer than two selected samples the cosines are 0, with none all is, and so are the gradients.

    Example:
        >>> n = {"clean": torch.tensor([2.0, 1.0]), "adversarial": torch.tensor([1.0, 2.0])}
        >>> a = {"clean": torch.tensor([0.0, 1.0]), "adversarial": torch.tensor([0.0, 3.0])}
        >>> terms = namid_loss(n, a, torch.tensor([True, True]), alpha=1.0, lambda_mi=0.1)
        >>> {name: round(value.item(), 4) for name, value in terms.items()}
        {'cosine_natural': 0.2, 'cosine_adversarial': 0.0, 'information': 0.0}
    """
    terms = {}
    kept = {
        name: own for name, own in (("natural", natural), ("adversarial", adversarial)) if information in (name, "both")
    }
    for name, estimates in kept.items():
        cosine, known = selected_cosine(estimates["clean"], estimates["adversarial"], selected)
        terms[f"cosine_{name}"] = alpha * torch.where(known, 1 - cosine, 0)
    if lambda_mi and lambda_term != "off":
        means = {name: selected_mean(estimates["adversarial"], selected) for name, estimates in kept.items()}
        if "adversarial" in means and lambda_term == "clipped":
            means["adversarial"] = means["adversarial"].relu()
        zero = selected.new_zeros((), dtype=torch.float32)
        moved = means.get("adversarial", zero) - means.get("natural", zero)
        terms["information"] = alpha * lambda_mi * moved
    return terms


class Namid(Regularizer):
    """NAMID's term.

    Args:
        alpha: 5 (section 4.1); at 0 the term is left out, and no estimators are needed.
        lambda_mi: 0.1 (section 4.1).
        lambda_term: "clipped" | "paper" | "off".
        selection: by the network as it is ("current") or by the reference network ("reference").
        estimators: checkpoint of `defense=mi_estimators`, or "auto": trained first, after their reference network.
        estimator_objective: "eq5" | "eq4" | "eq4_selected" | "released", of estimators=auto.
        estimator_epochs: 25 (section 4.1), of estimators=auto.
        hsize: width of the estimators; the authors' code has 2048.
        any_reference: allow estimators of another architecture's outputs, as the authors' code does for WRN-34-10.
        information: "both" | "natural" | "adversarial", which is left where the other is removed (Figure 5).

    Raises:
        ValueError: a negative weight or an unknown option.
    """

    needs_adversarial = True

    def __init__(
        self,
        *,
        alpha: float = 5.0,
        lambda_mi: float = 0.1,
        lambda_term: str = "clipped",
        selection: str = "current",
        estimators: str = AUTO,
        estimator_objective: str = "eq5",
        estimator_epochs: int = 25,
        hsize: int = 2048,
        any_reference: bool = False,
        information: str = "both",
    ) -> None:
        super().__init__()
        for name, weight in {"alpha": alpha, "lambda_mi": lambda_mi}.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"regularizer.namid.{name}={weight}: expected 0 or more")
        for name, size in {"estimator_epochs": estimator_epochs, "hsize": hsize}.items():
            if size < 1:
                raise ValueError(f"regularizer.namid.{name}={size}: expected 1 or more")
        choices = {
            "lambda_term": (lambda_term, LAMBDA_TERMS),
            "selection": (selection, SELECTIONS),
            "estimator_objective": (estimator_objective, OBJECTIVES),
            "information": (information, INFORMATION),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"regularizer.namid.{name}={value!r}: expected one of {', '.join(known)}")
        self.alpha, self.lambda_mi, self.lambda_term, self.selection = alpha, lambda_mi, lambda_term, selection
        self.information = information
        self.estimators, self.hsize, self.any_reference = estimators, hsize, any_reference
        self.estimator_objective, self.estimator_epochs = estimator_objective, estimator_epochs
        self.coupled = "the mutual information of regularizer.namid" if alpha else ""
        self.natural: nn.Module = nn.Identity()
        self.adversarial: nn.Module = nn.Identity()
        self.reference: nn.Module = nn.Identity()
        self._readings: dict[str, Tensor] = {}
        self.trained: Tensor
        self.register_buffer("trained", torch.tensor(False))

    def adapt(self, net: nn.Module) -> None:
        """Make room for the estimators, and for the reference network where it selects; `take` fills it afterwards.

        Raises:
            ValueError: a network that does not say its size, or images that are too small.
        """
        self.trained.fill_(False)
        if self.alpha:
            owner = "regularizer.namid"
            self.natural = critic_of(net, hsize=self.hsize, owner=owner).requires_grad_(False).eval()
            self.adversarial = critic_of(net, hsize=self.hsize, owner=owner).requires_grad_(False).eval()
            if self.selection == "reference":
                self.reference = copy.deepcopy(net).requires_grad_(False).eval()

    def take(self, state: Mapping[str, Any]) -> None:
        """Take the weights of a finished `defense=mi_estimators`.

        Args:
            state: its state dict: "natural.", "adversarial." and "net.".

        Raises:
            ValueError: estimators for other images or outputs, or a reference of another architecture.
        """
        modules = {"natural": self.natural, "adversarial": self.adversarial}
        if self.selection == "reference":
            modules["net"] = self.reference
        for prefix, module in modules.items():
            own = {name.removeprefix(f"{prefix}."): v for name, v in state.items() if name.startswith(f"{prefix}.")}
            try:
                module.load_state_dict(own)
            except RuntimeError as error:
                raise ValueError(str(error).splitlines()[0]) from error
        self.trained.fill_(True)

    def train(self, mode: bool = True) -> Namid:
        """Nothing here is trained: all stays in eval mode."""
        return super().train(False)

    def on_fit_start(self, ctx: Context) -> None:
        """Refuse to train on estimators that know nothing."""
        if self.alpha and not self.trained:
            raise ValueError(
                "regularizer.namid has no trained estimators: use mi_at.train, or give it those of a checkpoint of "
                "defense=mi_estimators (`take`)"
            )

    def terms(self, views: Views) -> dict[str, Tensor]:
        """Eq. 8, weighted, on the global batch."""
        if not self.alpha:
            return {}
        outputs = {view: views.logits(view) for view in ("clean", "adversarial")}
        images = views.images("clean")
        natural = self._estimates(self.natural, images, outputs, views)
        adversarial = self._estimates(self.adversarial, views.images("adversarial") - images, outputs, views)
        with torch.no_grad():
            selected = broken_by_attack(*self._judged(views, outputs), views.y)
        self._readings = {
            "selected": selected.sum(),
            **{f"natural_{view}": selected_mean(e.detach(), selected) for view, e in natural.items()},
            **{f"adversarial_{view}": selected_mean(e.detach(), selected) for view, e in adversarial.items()},
        }
        return namid_loss(
            natural,
            adversarial,
            selected,
            alpha=self.alpha,
            lambda_mi=self.lambda_mi,
            lambda_term=self.lambda_term,
            information=self.information,
        )

    def readings(self) -> dict[str, Tensor]:
        """How many samples of the batch were selected, and the four estimates on them, in nats."""
        return self._readings

    def _estimates(
        self, critic: nn.Module, former: Tensor, outputs: Mapping[str, Tensor], views: Views
    ) -> dict[str, Tensor]:
        """[B] estimates by view; the patches are embedded once, on the process that holds them."""
        if not isinstance(critic, LocalDIM):
            raise ValueError("regularizer.namid has no network yet: attach one first")
        if len(views.y) < 2:  # the last batch of an epoch: one image has no negatives
            return {view: z.sum(dim=1) * 0 for view, z in outputs.items()}
        with torch.no_grad():
            patches = gather(critic.embed_images(former), views.batch.global_size or None)
        return {
            view: local_donsker_varadhan(pair_scores(critic.embed_outputs(z), patches)) for view, z in outputs.items()
        }

    def _judged(self, views: Views, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits by which samples are selected."""
        if self.selection == "current":
            return outputs["clean"], outputs["adversarial"]
        size = views.batch.global_size or None
        clean, adversarial = (gather(self.reference(views.images(view)), size) for view in ("clean", "adversarial"))
        return clean, adversarial
