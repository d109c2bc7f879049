"""ib_rar: adversarial training with an information bottleneck over layers and a channel mask.

Paper: IB-RAR: Information bottleneck as regularizer for adversarial robustness, eq. 2 and 3.
min CE(p(x'), y) + alpha sum_l HSIC(X, T_l) - beta sum_l HSIC(Y, T_l),  x' = argmax CE(p(x'), y).

The same training as `defense=standard_at regularizer=ib_rar`; `mi_at.regularizers.ib_rar` lists the differences.
"""

from __future__ import annotations

from mi_at.defenses.standard_at import StandardATWith, options_of
from mi_at.regularizers.ib_rar import InformationBottleneck


class IbRar(StandardATWith):
    """IB-RAR on standard adversarial training; options of `mi_at.regularizers.ib_rar.InformationBottleneck`."""

    __init__ = options_of("ib_rar", InformationBottleneck)
