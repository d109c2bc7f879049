"""namid: natural-adversarial mutual information-based defense; standard adversarial training with its term.

Paper: Zhou et al., Improving adversarial robustness via mutual information estimation (NAMID), ICML 2022, eq. 9.
min CE(p(x~')) + alpha L_mi; the term, its differences from the paper and from the authors' code are those of
`mi_at.regularizers.namid`: the same training as `defense=standard_at regularizer=namid`.
"""

from __future__ import annotations

from mi_at.defenses.standard_at import StandardATWith, options_of
from mi_at.regularizers import namid


class Namid(StandardATWith):
    """NAMID; its options are those of the regularizer."""

    __init__ = options_of("namid", namid.Namid)
