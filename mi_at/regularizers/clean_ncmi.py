"""clean_ncmi: ncmi of the clean samples, without a second adversary.

Paper: Enhancing adversarial robustness through robust information quantities (robust NCMI), appendix K, after Yang et
al. 2023 (CMIC-DL): alpha mean D(f(x) || Q_y) - beta Gamma on the clean batch. After every step Q_y moves, with tau_q,
towards the mean output on extra training samples of the class: 8 on CIFAR-100, 64 on CIFAR-10, x4 with 1M images.

Differences from the paper: those of ncmi in the loss (the gradient of the separation, the clamped logarithm). The
appendix gives no alpha and beta: the defaults are those of robust NCMI with trades on CIFAR-10 (Table 3). The centroids
start as in Algorithm 1, the extra samples are drawn with replacement, without crop and flip, and their forwards run in
eval mode: it does not say. The authors' code does not contain it.
"""

from __future__ import annotations

from torch import Tensor, nn

from mi_at.attacks.inner import Inner, Objective
from mi_at.data.batch import Batch
from mi_at.functional.distributed import gather
from mi_at.regularizers.base import Context, Views
from mi_at.regularizers.ncmi import NCMI, outputs


class CleanNCMI(NCMI):
    """NCMI of clean samples.

    Args:
        alpha: weight of the concentration (CMI).
        beta: weight of the separation.
        tau_q: moving average of the centroids, in [0, 1]; 0.999, 0.99 with 1M synthetic images.
        samples_per_class: extra training samples of every class per batch, >= 1.
        tau_q_warmup: min(tau_q, (1 + t) / (10 + t)) at step t, counted from 0, instead of tau_q.
        separation_grad: "detached" | "both".
        separation_norm: "batch_sq" (eq. 18) | "pairs".

    Raises:
        ValueError: a value out of range or an unknown option.
    """

    name = "clean_ncmi"
    own_views = ()

    def __init__(
        self,
        *,
        alpha: float = 0.01,
        beta: float = 0.1,
        tau_q: float = 0.999,
        samples_per_class: int = 64,
        tau_q_warmup: bool = False,
        separation_grad: str = "detached",
        separation_norm: str = "batch_sq",
    ) -> None:
        super().__init__(
            alpha=alpha,
            beta=beta,
            tau_q=tau_q,
            tau_q_warmup=tau_q_warmup,
            separation_grad=separation_grad,
            separation_norm=separation_norm,
        )
        if samples_per_class < 1:
            raise ValueError(f"regularizer.{self.name}.samples_per_class={samples_per_class}: expected 1 or more")
        self.samples_per_class = samples_per_class

    def adversaries(self, net: nn.Module, batch: Batch) -> dict[str, Objective | Inner]:
        """None."""
        return {}

    def terms(self, views: Views) -> dict[str, Tensor]:
        """The terms "con" and "sep" of the clean view."""
        return self._loss(views.logits("clean"), views.y) if self.on else {}

    def after_step(self, ctx: Context, batch: Batch) -> None:
        """Move all centroids towards the outputs on extra samples."""
        if self.alpha:
            extra = ctx.draw_per_class(self.samples_per_class).to(self.centroids.device)
            self._follow(outputs(ctx.net, extra, extra.x), gather(extra.y, extra.global_size))
