"""mi_estimators: the second stage of namid, two estimators of mutual information on a frozen reference network.

Paper: Zhou et al., Improving adversarial robustness via mutual information estimation (NAMID), ICML 2022, eq. 4-6.
max E_n(x') - E_n(x~') over the natural estimator, max E_a(x~') - E_a(x') over the adversarial one, on the samples that
the reference h_0 has right and whose adversarial version it has wrong. E_n(x~) pairs the logits h_0(x~) with the image
x, E_a(x~) pairs them with the noise x~ - x.

Differences from the paper: the estimate that is driven down is hinged at 0, as the positive part of its mean over the
batch (as printed eq. 5 has no lower bound: -733 nats where the information is below 2.3).
Differences from the authors' code: its objective, cosines in place of the difference, is `objective=released`; its
argmax over the batch in place of the classes is not kept; a sample's own patches are left out of its negatives (its
masked diagonal adds exp 0); one Adam for both estimators, whose losses share no parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mi_at.attacks import objectives
from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.defenses.base import ADVERSARIAL, Defense, require_one_of
from mi_at.estimators.local_dim import LocalDIM, count_gradients_once, critic_of, pair_scores
from mi_at.functional.distributed import gather
from mi_at.functional.selection import broken_by_attack, selected_cosine, selected_mean
from mi_at.functional.variational import local_donsker_varadhan
from mi_at.regularizers.base import Views

OBJECTIVES = ("eq5", "eq4", "eq4_selected", "released")


def estimators_loss(
    natural: Mapping[str, Tensor],
    adversarial: Mapping[str, Tensor],
    *,
    right: Tensor,
    broken: Tensor,
    objective: str = "eq5",
) -> dict[str, Tensor]:
    """What the two estimators minimise (eq. 4 or 5, negated).

    Args:
        natural: "clean" and "adversarial" -> [B] natural information of that view's outputs, nats.
        adversarial: the same of the adversarial information.
        right: [B] bool, samples that the reference has right as they are.
        broken: [B] bool, those of them that it has wrong under attack: the selection of eq. 6.
        objective: "eq5" with the hinge, "eq4" (no selection, nothing is driven down), "eq4_selected" (the same on the
            selection, for its Figure 4), or "released".

    Returns:
        {"natural", "adversarial", "loss"}: scalars, nats.

    Raises:
        ValueError: an unknown objective.

    Example:
        >>> low, high, all_ = torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0]), torch.tensor([True, True])
        >>> n, a = {"clean": high, "adversarial": low}, {"clean": low, "adversarial": high}
        >>> estimators_loss(n, a, right=all_, broken=all_)["natural"].item()  # what is below 0 is left alone
        -1.5
    """
    require_one_of(OBJECTIVES, objective=objective)
    if objective == "eq4":
        terms = {"natural": -natural["clean"].mean(), "adversarial": -adversarial[ADVERSARIAL].mean()}
    elif objective == "eq4_selected":
        raised = {"natural": natural["clean"], "adversarial": adversarial[ADVERSARIAL]}
        terms = {name: -selected_mean(estimates, broken) for name, estimates in raised.items()}
    elif objective == "eq5":
        n, a = ({view: selected_mean(e, broken) for view, e in both.items()} for both in (natural, adversarial))
        terms = {"natural": n[ADVERSARIAL].relu() - n["clean"], "adversarial": a["clean"].relu() - a[ADVERSARIAL]}
    else:
        terms = {
            "natural": _released(natural, "clean", right, broken, kept=5.0, weight=-0.5),
            "adversarial": _released(adversarial, ADVERSARIAL, right, broken, kept=8.0, weight=0.05),
        }
    return terms | {"loss": terms["natural"] + terms["adversarial"]}


def _released(
    estimates: Mapping[str, Tensor], raised: str, right: Tensor, broken: Tensor, *, kept: float, weight: float
) -> Tensor:
    """Where the attack wins the two views' estimates are made orthogonal, where it does not, parallel."""
    clean, adversarial = estimates["clean"], estimates[ADVERSARIAL]
    resisted = right & ~broken
    apart, apart_known = selected_cosine(clean, adversarial, broken)
    together, together_known = selected_cosine(clean, adversarial, resisted)
    count = right.sum().clamp_min(1)

    def mean(selected: Tensor) -> Tensor:  # over all that are right, as in the code
        return torch.where(selected, estimates[raised], 0).sum() / count

    wrong = 5.0 * torch.where(apart_known, apart.abs(), 0) - mean(broken)
    return wrong + 0.5 * kept * torch.where(together_known, 1 - together, 0) + weight * mean(resisted)


class MIEstimators(Defense):
    """Stage 2 of namid: trains estimators, not the network, which is the reference.

    The optimiser and the batch size are options of its own: `optim` and `dataset.batch_size` are those of the reference
    network, which `reference=auto` trains first by standard adversarial training.

    Args:
        reference: checkpoint of the reference network, or "auto" (section 3.2.2: standard AT).
        objective: "eq5" | "eq4" | "eq4_selected" | "released".
        hsize: width of the estimators; the authors' code has 2048.
        lr: of Adam (section 4.1).
        epochs: 25 (section 4.1).
        batch_size: 400 (section 4.1).
        milestones: epochs of 25 after which the rate falls to a tenth.

    Raises:
        ValueError: an unknown objective, or a number out of range.
    """

    coupled = "the mutual information of defense=mi_estimators"

    def __init__(
        self,
        *,
        reference: str = "auto",
        objective: str = "eq5",
        hsize: int = 2048,
        lr: float = 1e-2,
        epochs: int = 25,
        batch_size: int = 400,
        milestones: Sequence[int] = (10, 20),
    ) -> None:
        super().__init__()
        require_one_of(OBJECTIVES, objective=objective)
        for name, value, least in (("hsize", hsize, 1), ("epochs", epochs, 1), ("batch_size", batch_size, 2)):
            if value < least:
                raise ValueError(f"defense.{name}={value}: expected {least} or more")
        if not 0 < lr < float("inf"):
            raise ValueError(f"defense.lr={lr}: expected a positive number")
        self.reference, self.objective, self.hsize = reference, objective, hsize
        self.natural: nn.Module = nn.Identity()
        self.adversarial: nn.Module = nn.Identity()
        self._readings: dict[str, Tensor] = {}
        self._estimates = {name: MeanMetric(nan_strategy="disable") for name in ("natural", "adversarial")}

    def adapt(self, net: nn.Module) -> None:
        """Freeze the network and make the estimators of its size.

        Raises:
            ValueError: a network that does not say its size, or images that are too small.
        """
        net.requires_grad_(False)
        self.natural = critic_of(net, hsize=self.hsize, owner="defense.mi_estimators")
        self.adversarial = critic_of(net, hsize=self.hsize, owner="defense.mi_estimators")
        count_gradients_once(self.natural)
        count_gradients_once(self.adversarial)

    def train(self, mode: bool = True) -> MIEstimators:
        """The network stays in eval mode: it is not what is trained."""
        super().train(mode)
        self.net.eval()
        return self

    def trained_parameters(self) -> list[nn.Parameter]:
        """The estimators'."""
        return [*self.natural.parameters(), *self.adversarial.parameters()]

    def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
        """Cross-entropy of the reference, from a small Gaussian start."""
        return {ADVERSARIAL: Inner(objectives.cross_entropy(self.net, batch.y), init="gaussian")}

    def loss(self, views: Views) -> dict[str, Tensor]:
        """Eq. 5 on the global batch, which every process forwards: the estimators hold batch norm."""
        outputs = {view: views.logits(view).detach() for view in ("clean", ADVERSARIAL)}
        right = outputs["clean"].argmax(dim=1) == views.y
        broken = broken_by_attack(outputs["clean"], outputs[ADVERSARIAL], views.y)
        natural, adversarial = self._both(views.batch, ADVERSARIAL, outputs)
        self._readings = {
            "selected": broken.sum(),
            **{f"natural_{view}": selected_mean(e, broken) for view, e in natural.items()},
            **{f"adversarial_{view}": selected_mean(e, broken) for view, e in adversarial.items()},
        }
        return estimators_loss(natural, adversarial, right=right, broken=broken, objective=self.objective)

    def readings(self) -> dict[str, Tensor]:
        """How many samples of the batch were selected, and the four estimates on them."""
        return {name: value.detach() for name, value in self._readings.items()}

    def _both(self, batch: Batch, view: str, outputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
        """Natural and adversarial information of the outputs of two views, per sample of the global batch."""
        images, noise = batch.x, batch.views[view] - batch.x
        return tuple(
            _estimate(critic, gather(former, batch.global_size), outputs)
            for critic, former in ((self.natural, images), (self.adversarial, noise))
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The reference's accuracies, and the two estimates that must be positive, in eval mode."""
        super().validation_step(batch, batch_idx)
        view = "cross_entropy"
        outputs = {
            "clean": gather(self.net(batch.x), batch.global_size),
            ADVERSARIAL: gather(self.net(batch.views[view]), batch.global_size),
        }
        with torch.autocast(batch.x.device.type, enabled=False):
            natural, adversarial = self._both(batch, view, outputs)
        self._estimates["natural"].update(natural["clean"])
        self._estimates["adversarial"].update(adversarial[ADVERSARIAL])

    def on_validation_epoch_end(self) -> None:
        """Log both."""
        super().on_validation_epoch_end()
        for name, metric in self._estimates.items():
            self.log(f"val/{name}_mi", metric.compute(), batch_size=1)
            metric.reset()

    def on_fit_start(self) -> None:
        """As every defense; the metrics go to the device."""
        for metric in self._estimates.values():
            metric.to(self.device)
        super().on_fit_start()


def _estimate(critic: nn.Module, images: Tensor, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(critic, LocalDIM):
        raise ValueError("defense.mi_estimators has no network yet: attach one first")
    alone = len(images) < 2  # the last batch of an epoch: one image has no negatives
    patches = critic.embed_images(torch.cat([images, images]) if alone else images)
    found = {}
    for view, z in outputs.items():
        scores = pair_scores(critic.embed_outputs(torch.cat([z, z]) if alone else z), patches)
        found[view] = local_donsker_varadhan(scores)[:1] * 0 if alone else local_donsker_varadhan(scores)
    return found
