"""vib: a variational information bottleneck before the last layer, the baseline of ib_rar's Fig. 2.

Paper: Deep variational information bottleneck (Alemi et al., ICLR 2017), eq. 17.
min CE(f(z), y) + beta KL(N(mu(x), diag sigma(x)^2) || N(0, I)), z drawn once per image.

Differences from the paper and its public re-implementation (which ib_rar does not replace by a code of its own): any
network instead of two hidden linear layers of 1024; z of the size that shared_info gives a network (256 there), the
optimiser of the run instead of Adam 1e-4, natural logarithms throughout (it divides both terms by ln 2), sigma is at
least 0.001; at test the mean of z (it draws z, and as an option averages 12 draws).
"""

from __future__ import annotations

from torch import Tensor, nn

from mi_at.attacks import objectives
from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.defenses.base import ADVERSARIAL, Defense, require_non_negative, require_one_of
from mi_at.functional.divergences import cross_entropy, kl_to_standard_normal
from mi_at.models.base import Classifier
from mi_at.models.latent import CHOICES, latent_takes
from mi_at.regularizers.base import Views


def vib_loss(logits: Tensor, mu: Tensor, sigma: Tensor, y: Tensor, *, beta: float) -> dict[str, Tensor]:
    """CE(f(z), y) + beta KL(N(mu, diag sigma^2) || N(0, I)) (Alemi et al. eq. 17).

    Args:
        logits: [B, K] of one z per image.
        mu: [B, d].
        sigma: [B, d], > 0.
        y: [B] int64.
        beta: weight of the rate, >= 0; at 0 the term is left out.

    Returns:
        "ce", "rate" where it is in use, and "loss", their sum: scalars in nats.

    Example:
        >>> import torch
        >>> zero, one = torch.zeros(2, 4), torch.ones(2, 4)
        >>> terms = vib_loss(zero, one, one, torch.tensor([0, 1]), beta=0.1)
        >>> round(terms["rate"].item(), 4)  # a unit shift in 4 dimensions: 4 / 2
        0.2
    """
    terms = {"ce": cross_entropy(logits, y)}
    if beta:
        terms["rate"] = beta * kl_to_standard_normal(mu, sigma)
    return terms | {"loss": sum(terms.values(), start=logits.new_zeros(()))}


class Vib(Defense):
    """The variational information bottleneck, on clean images or in adversarial training.

    Args:
        beta: 0.001 (the public re-implementation; ib_rar does not state its own).
        view: "clean" as in ib_rar's Fig. 2, or "adversarial": cross-entropy and rate of adversarial images.
        latent_dim: size of z; None: `models.latent.latent_size`.
        std_offset: sigma = softplus(raw - std_offset) + 0.001; 5 in the public re-implementation.
        attack_latent: "mean" | "sample" in the training attack, whatever its mode.
        test_latent: "mean" | "sample" in eval mode.

    Raises:
        ValueError: a value out of range or an unknown option.
    """

    taps = ("latent_mean", "latent_std")

    def __init__(
        self,
        *,
        beta: float = 1e-3,
        view: str = "clean",
        latent_dim: int | None = None,
        std_offset: float = 5.0,
        attack_latent: str = "mean",
        test_latent: str = "mean",
    ) -> None:
        super().__init__()
        require_non_negative(beta=beta)
        if latent_dim is not None and latent_dim < 1:
            raise ValueError(f"defense.latent_dim={latent_dim}: expected 1 or more")
        require_one_of(("clean", ADVERSARIAL), view=view)
        require_one_of(CHOICES, attack_latent=attack_latent)
        require_one_of(CHOICES, test_latent=test_latent)
        if view == "clean" and attack_latent == "sample":
            raise ValueError(
                f"defense.attack_latent={attack_latent} with view={view}: training attacks nothing; set "
                "defense.view=adversarial, or leave it at mean"
            )
        self.beta, self.view = beta, view
        self.latent_dim, self.std_offset = latent_dim, std_offset
        self.attack_latent, self.test_latent = attack_latent, test_latent

    def adapt(self, net: nn.Module) -> None:
        """Put the stochastic layer in.

        Raises:
            ValueError: a network without a place for it.
        """
        if not isinstance(net, Classifier):
            raise ValueError(
                f"defense=vib needs a place for its stochastic layer, which {type(net).__name__} has not: derive the "
                "network from mi_at.models.Classifier"
            )
        net.insert_latent(dim=self.latent_dim, std_offset=self.std_offset, test=self.test_latent)

    def adversaries(self, batch: Batch) -> dict[str, Objective | Inner]:
        """None on clean images; cross-entropy where adversarial images are learnt from."""
        if self.view == "clean":
            return {}
        return {ADVERSARIAL: Inner(objectives.cross_entropy(self._attacked, batch.y))}

    def loss(self, views: Views) -> dict[str, Tensor]:
        """Eq. 17 on the global batch."""
        logits = views.logits(self.view)
        mu, sigma = views.tap(self.view, "latent_mean"), views.tap(self.view, "latent_std")
        return vib_loss(logits, mu, sigma, views.y, beta=self.beta)

    def _attacked(self, x: Tensor) -> Tensor:
        """Logits as the training attack sees them."""
        with latent_takes(self.net, self.attack_latent):
            logits: Tensor = self.net(x)
        return logits
