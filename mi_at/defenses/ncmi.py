"""ncmi: standard adversarial training with a second adversary on the clusters of outputs (robust NCMI, Algorithm 1).

Paper: Enhancing adversarial robustness through robust information quantities (robust NCMI), eq. 39-41, Algorithm 1.
min CE(p(x^), y) + 1/|B| L_B, the term of `mi_at.regularizers.ncmi`, whose header lists the differences; the same
training as `defense=standard_at regularizer=ncmi`. On another base loss: `defense=trades regularizer=ncmi`.
"""

from __future__ import annotations

from mi_at.defenses.standard_at import StandardATWith, options_of
from mi_at.regularizers import ncmi


class NCMI(StandardATWith):
    """Algorithm 1 on cross-entropy; options, defaults and ranges are those of `mi_at.regularizers.ncmi.NCMI`."""

    __init__ = options_of("ncmi", ncmi.NCMI)
