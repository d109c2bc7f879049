"""shared_info: what clean and adversarial latents share is kept, what is specific to a view is discarded.

Paper: Improving adversarial robustness by learning shared information (Yu et al., Pattern Recognition 2022), eq. 16,
Algorithm 1. min alpha CE(f(x'), y) + (1 - alpha) CE(f(x), y) + beta D_SKL(p(z|x) || p(z'|x')) - lambda I(z; z'),
x' = argmax CE(f(x'), y), z ~ N(mu(x), diag sigma(x)^2) before the last layer, I by HSIC, MINE or MIGE.

Differences from the paper, which has no public code; where it is silent:
- eq. 7 prints minus signs before both cross-entropies, eq. 16 plus: plus. The kernel of A.3 lacks its minus: added.
- D_SKL is summed over dimensions and averaged over the batch; sigma = softplus(raw) + 0.001.
- HSIC is the trace tr(KHLH) (`hsic_scale`): with the factor (m-1)^-2 of the estimate and the paper's lambda the term
  is inert, which the paper's Tables 10 and 13 exclude.
- The kernel width is one for each view, the sample itself is not its neighbour, and no gradient flows through it.
- MINE's critic is 2d-512-512-1 (the paper prints 256 for 2d), with its own Adam 1e-4, one step after each step of the
  network on the same latents.
- The training attack and the test take the mean of z (`attack_latent`, `test_latent`); drawing it at test makes
  gradient attacks look weak.
- beta rises per epoch, in the proportion of a run of `beta_epochs` epochs, so that a short run reaches it too.
- On the softmax output a head that starts at zero (cnn4) starts as PyTorch does: equal outputs have no width.
- A last batch of an epoch with no more than k samples takes as many neighbours as it has.

At a high rate it can collapse (MNIST at rate .05, trace, lambda .001: 9.9 % after epoch 2). Nothing holds the scale of
z: D_SKL does not change if mu and sigma are scaled together, nor does HSIC, whose width follows. Where a batch holds
more of a class than k (12.8 of 128, k = 10) the width is the distance within classes, and as no gradient flows through
it, a smaller scale raises HSIC: measured d HSIC / d ln scale is -979 at HSIC 589 for tight clusters in a batch of 128,
+210 at 298 in one of 64. So sigma and mu shrink together (narrow cnn4, 4 lambda, 120 steps: sigma .95 to .11, |mu| 1.6
to .25) while the gradients of both terms grow as 1 / scale, and the trace as the square of the batch, until they drown
the cross-entropies: where the least sigma falls to .02 or .03, D_SKL jumps to 70 to 170 and its gradient to 1.2 to 3
times theirs; at 16 lambda the gradient of HSIC ends at ten times theirs, and accuracy at 22 %. Clipping the gradient
(trainer.gradient_clip_val=1) bounds the step and leaves the loss as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.defenses.base import ADVERSARIAL, Defense, require_non_negative, require_one_of
from mi_at.estimators.mige import mige_mutual_information
from mi_at.estimators.mine import Mine
from mi_at.functional import kernels
from mi_at.functional.divergences import cross_entropy, symmetrised_kl, symmetrised_kl_categorical
from mi_at.models.base import Classifier
from mi_at.models.latent import CHOICES, TAPS, StochasticLatent, latent_takes
from mi_at.regularizers.base import Views

ESTIMATORS = ("hsic", "mine", "mige")
SCALES = ("trace", "biased", "normalized")


def shared_info_loss(
    logits: Tensor | None,
    logits_adv: Tensor | None,
    y: Tensor,
    *,
    alpha: float,
    divergence: Tensor | None = None,
    beta: float = 0.0,
    information: Tensor | None = None,
    lambda_mi: float = 0.0,
) -> dict[str, Tensor]:
    """alpha CE(f(x'), y) + (1 - alpha) CE(f(x), y) + beta D_SKL - lambda I (eq. 16).

    Args:
        logits: [B, K] of the clean images; None leaves their cross-entropy out, the other weights as they are.
        logits_adv: [B, K] of the adversarial images; None likewise.
        y: [B] int64.
        alpha: weight of the adversarial cross-entropy, in [0, 1].
        divergence: scalar D_SKL in nats; None leaves it out.
        beta: its weight, >= 0.
        information: scalar I(z; z') or what stands for it; None leaves it out.
        lambda_mi: its weight, >= 0.

    Returns:
        The terms in use, signed and weighted, and "loss", their sum: scalars.

    Raises:
        ValueError: no term is left.

    Example:
        >>> import torch
        >>> z, y = torch.zeros(2, 4), torch.tensor([0, 1])
        >>> terms = shared_info_loss(z, z, y, alpha=0.5, information=torch.tensor(3.0), lambda_mi=0.1)
        >>> {name: round(value.item(), 4) for name, value in terms.items()}
        {'ce_adv': 0.6931, 'ce_clean': 0.6931, 'shared_mi': -0.3, 'loss': 1.0863}
    """
    terms: dict[str, Tensor] = {}
    if logits_adv is not None:
        terms["ce_adv"] = alpha * cross_entropy(logits_adv, y)
    if logits is not None:
        terms["ce_clean"] = (1 - alpha) * cross_entropy(logits, y)
    if divergence is not None:
        terms["dskl"] = beta * divergence
    if information is not None:
        terms["shared_mi"] = -lambda_mi * information
    if not terms:
        raise ValueError("shared_info_loss without any term: expected logits, a divergence or an information")
    first, *others = terms.values()
    return terms | {"loss": sum(others, start=first)}


def shared_hsic(z: Tensor, z_adv: Tensor, *, k: int = 10, scale: str = "trace") -> Tensor:
    """HSIC(z, z') with the width rule of section 4.1 for each view (eq. 19).

    Args:
        z: [B, d] of the clean images.
        z_adv: [B, d] of the adversarial images.
        k: neighbours of the width rule, >= 1; at most B - 1 are taken.
        scale: "trace" tr(KHLH), "biased" the same / (B-1)^2, "normalized" tr(R R') with R = K_c (K_c + eps B I)^-1.

    Returns:
        Scalar of z's type, >= 0, no unit.

    Raises:
        ValueError: an unknown scale, or fewer than two samples.

    Example:
        >>> import torch
        >>> z = torch.eye(4)
        >>> round(shared_hsic(z, z, k=3, scale="biased").item(), 4)
        0.0516
    """
    require_one_of(SCALES, hsic_scale=scale)
    samples = len(z)
    width, width_adv = (kernels.knn_width(view, min(k, samples - 1)) for view in (z, z_adv))
    if scale == "normalized":
        smoothers = [
            kernels.smoother(kernels.gaussian_kernel(view, width=w)) for view, w in ((z, width), (z_adv, width_adv))
        ]
        return (smoothers[0] * smoothers[1]).sum().to(z)
    value = kernels.hsic(z, z_adv, sigma_x=width, sigma_z=width_adv)
    return (value * (samples - 1) ** 2 if scale == "trace" else value).to(z)


def beta_at(epoch: int, *, beta: float, start: float, hold: int, rise: int) -> float:
    """beta in an epoch: `start` until epoch `hold`, then geometric to `beta` over `rise` epochs (section 4.1).

    Args:
        epoch: counted from 1.
        beta: final value; 0 switches the term off.
        start: first value, > 0.
        hold: epochs at `start`.
        rise: epochs of the rise; the last of them has `beta`.

    Example:
        >>> [round(beta_at(epoch, beta=4, start=1e-3, hold=10, rise=90), 4) for epoch in (1, 10, 55, 100, 120)]
        [0.001, 0.001, 0.0632, 4, 4]
    """
    if not beta or epoch >= hold + rise:
        return beta
    return start if epoch <= hold else start * (beta / start) ** ((epoch - hold) / rise)


class SharedInfo(Defense):
    """Adversarial training with shared information regularisation.

    Args:
        alpha: 0.5 (section 4.3).
        beta: 4 on MNIST and CIFAR-10, 6 on CIFAR-100 (section 4.3).
        lambda_mi: 0.001 with HSIC (section 4.3), 0.01 with MINE and MIGE (A.3).
        beta_start: 0.001 (section 4.1).
        beta_hold_epochs: 10.
        beta_rise_epochs: 90.
        beta_epochs: epochs of the run that the two refer to.
        use_ce_adv: the term's switch; the other weights stay as they are (Table 10).
        use_ce_clean: the same.
        use_dskl: the same.
        use_mi: the same.
        estimator: "hsic" | "mine" | "mige" (A.3). MIGE gives the gradient alone: its term's value is 0.
        hsic_scale: "trace" | "biased" | "normalized".
        k: neighbours of the kernel's width (section 4.1).
        location: "latent", or "softmax" without a stochastic layer (A.4).
        latent_dim: size of z; None: 128 on cnn4, 256 on resnet18, 320 on wrn (`models.latent.latent_size`).
        std_offset: sigma = softplus(raw - std_offset) + 0.001.
        attack_latent: "mean" | "sample" in the training attack, whatever its mode.
        test_latent: "mean" | "sample" in eval mode.

    Raises:
        ValueError: a value out of range, an unknown option, or no term in use.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        beta: float = 4.0,
        lambda_mi: float = 0.001,
        beta_start: float = 1e-3,
        beta_hold_epochs: int = 10,
        beta_rise_epochs: int = 90,
        beta_epochs: int = 100,
        use_ce_adv: bool = True,
        use_ce_clean: bool = True,
        use_dskl: bool = True,
        use_mi: bool = True,
        estimator: str = "hsic",
        hsic_scale: str = "trace",
        k: int = 10,
        location: str = "latent",
        latent_dim: int | None = None,
        std_offset: float = 0.0,
        attack_latent: str = "mean",
        test_latent: str = "mean",
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"defense.alpha={alpha}: expected a share in [0, 1]")
        require_non_negative(
            beta=beta,
            lambda_mi=lambda_mi,
            beta_hold_epochs=beta_hold_epochs,
            beta_rise_epochs=beta_rise_epochs,
        )
        if not 0 < beta_start < float("inf"):
            raise ValueError(f"defense.beta_start={beta_start}: expected a number above 0, where the rise begins")
        for name, value in (("beta_epochs", beta_epochs), ("k", k), ("latent_dim", latent_dim)):
            if value is not None and value < 1:
                raise ValueError(f"defense.{name}={value}: expected 1 or more")
        require_one_of(ESTIMATORS, estimator=estimator)
        require_one_of(SCALES, hsic_scale=hsic_scale)
        require_one_of(("latent", "softmax"), location=location)
        require_one_of(CHOICES, attack_latent=attack_latent)
        require_one_of(CHOICES, test_latent=test_latent)
        if location == "softmax" and (std_offset or "sample" in (attack_latent, test_latent)):
            raise ValueError(
                f"defense.location=softmax with std_offset={std_offset}, attack_latent={attack_latent}, "
                f"test_latent={test_latent}: it has no stochastic layer; leave them at 0, mean and mean"
            )
        self.alpha, self.beta, self.lambda_mi = alpha, beta, lambda_mi
        self.beta_start, self.beta_epochs = beta_start, beta_epochs
        self.beta_hold_epochs, self.beta_rise_epochs = beta_hold_epochs, beta_rise_epochs
        # A weight of 0 leaves its term out, and with the terms of a view its forward.
        self.use_ce_adv, self.use_ce_clean = use_ce_adv and alpha > 0, use_ce_clean and alpha < 1
        self.use_dskl, self.use_mi = use_dskl and beta > 0, use_mi and lambda_mi > 0
        if not (self.use_ce_adv or self.use_ce_clean):
            raise ValueError(
                f"defense.alpha={alpha} with use_ce_adv={use_ce_adv} and use_ce_clean={use_ce_clean}: nothing is "
                "learnt from labels; switch one of them on with a weight above 0"
            )
        self.estimator, self.hsic_scale, self.k = estimator, hsic_scale, k
        self.location, self.latent_dim, self.std_offset = location, latent_dim, std_offset
        self.attack_latent, self.test_latent = attack_latent, test_latent
        self.taps = TAPS if location == "latent" else ()
        self.coupled = f"the {estimator} of defense=shared_info" if self.use_mi else ""
        self.mine: Mine | None = None
        self._seen: tuple[Tensor, Tensor] | None = None

    def adapt(self, net: nn.Module) -> None:
        """Put the stochastic layer in.

        Raises:
            ValueError: a network without a place for it, or a batch that the width rule cannot work with.
        """
        batch_size = self.config.get("dataset", {}).get("batch_size")
        if self.use_mi and self.estimator == "hsic" and batch_size is not None and batch_size <= self.k:
            raise ValueError(
                f"defense.k={self.k}: expected fewer neighbours than dataset.batch_size={batch_size}; "
                "use a smaller k or a larger batch"
            )
        if self.location == "latent":
            dim = self._insert(net)
        elif self.use_mi and self.estimator == "mine":
            dim = self._outputs(net)
        if self.location == "softmax" and self.use_mi and isinstance(net, Classifier):
            # Where all outputs start equal there is no distance to take the kernel's width from.
            weight = net.head.weight
            if not weight.is_meta and not weight.any():
                net.head.reset_parameters()
        if self.use_mi and self.estimator == "mine" and (self.mine is None or self.mine.dim != dim):
            self.mine = Mine(dim, lr=1e-4, seed=self.config.get("seed", 0))

    def _insert(self, net: nn.Module) -> int:
        if not isinstance(net, Classifier):
            raise ValueError(
                f"defense=shared_info needs a place for its stochastic layer, which {type(net).__name__} has not: "
                "derive the network from mi_at.models.Classifier, or use defense.location=softmax"
            )
        return net.insert_latent(dim=self.latent_dim, std_offset=self.std_offset, test=self.test_latent).dim

    def _outputs(self, net: nn.Module) -> int:
        """Number of classes, of a network of one's own too."""
        classes = getattr(net, "num_classes", None) or self.config.get("dataset", {}).get("num_classes")
        if classes is None:
            raise ValueError(
                f"defense.estimator=mine on the softmax output needs to know how many outputs {type(net).__name__} "
                "has: give it an attribute num_classes"
            )
        return int(classes)

    def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
        """Cross-entropy (Algorithm 1, line 5), from a small Gaussian start; none where no term asks for x'."""
        if not (self.use_ce_adv or self.use_dskl or self.use_mi):
            return {}
        return {ADVERSARIAL: Inner(objectives.cross_entropy(self._attacked, batch.y), init="gaussian")}

    def loss(self, views: Views) -> dict[str, Tensor]:
        """Eq. 16 on the global batch, with the beta of this epoch."""
        if self.use_ce_clean or self.use_dskl or self.use_mi:
            views.logits("clean")  # forwarded first, also where only its latent is read
        return shared_info_loss(
            views.logits("clean") if self.use_ce_clean else None,
            views.logits(ADVERSARIAL) if self.use_ce_adv else None,
            views.y,
            alpha=self.alpha,
            divergence=self._divergence(views) if self.use_dskl else None,
            beta=self.beta_now(),
            information=self._information(views) if self.use_mi else None,
            lambda_mi=self.lambda_mi,
        )

    def after_step(self, batch: Batch) -> None:
        """One step of MINE's critic on the latents of the batch (A.3)."""
        if self.mine is not None and self._seen is not None:
            self.mine.fit_step(*self._seen)
            self._seen = None

    def settings(self) -> dict[str, dict[str, Any]]:
        """As every defense; the size of z that a network was given."""
        latent = getattr(self.net, "latent", None)
        own = {"shared_info": {"latent_dim": latent.dim}} if isinstance(latent, StochasticLatent) else {}
        return own | super().settings()

    def beta_now(self) -> float:
        """beta of this epoch of this run."""
        share = (self.optimisation.epochs if self.optimisation else self.beta_epochs) / self.beta_epochs
        # Both ends in proportion: a run of three epochs reaches beta too.
        ends = (self.beta_hold_epochs, self.beta_hold_epochs + self.beta_rise_epochs)
        first, last = (max(1, round(epochs * share)) if epochs else 0 for epochs in ends)
        rise = last - first
        return beta_at(self.current_epoch + 1, beta=self.beta, start=self.beta_start, hold=first, rise=rise)

    def _attacked(self, x: Tensor) -> Tensor:
        """Logits as the training attack sees them."""
        with latent_takes(self.net, self.attack_latent):
            logits: Tensor = self.net(x)
        return logits

    def _divergence(self, views: Views) -> Tensor:
        if self.location == "softmax":
            return symmetrised_kl_categorical(views.logits("clean"), views.logits(ADVERSARIAL))
        of = {view: (views.tap(view, "latent_mean"), views.tap(view, "latent_std")) for view in ("clean", ADVERSARIAL)}
        return symmetrised_kl(*of["clean"], *of[ADVERSARIAL])

    def _information(self, views: Views) -> Tensor:
        if self.location == "softmax":
            z, z_adv = (views.logits(view).softmax(dim=1) for view in ("clean", ADVERSARIAL))
        else:
            z, z_adv = (views.tap(view, "latent") for view in ("clean", ADVERSARIAL))
        if len(z) < 2:  # the last batch of an epoch: one sample shares nothing
            return 0.0 * (z.sum() + z_adv.sum())
        if self.mine is not None:
            self._seen = z.detach(), z_adv.detach()
            return self.mine.estimate(z, z_adv)
        if self.estimator == "mige":
            return mige_mutual_information(z, z_adv).to(z)
        return shared_hsic(z, z_adv, k=self.k, scale=self.hsic_scale)
