"""ncmi_relaxed: ncmi with centroids once an epoch, for data of many classes (robust NCMI, Algorithm 2).

Paper: Enhancing adversarial robustness through robust information quantities (robust NCMI), eq. 39-41, Algorithm 2.
min CE(p(x^), y) + 1/|B| L_B, the term of `mi_at.regularizers.ncmi_relaxed`, whose header lists the differences; the
same training as `defense=standard_at regularizer=ncmi_relaxed`.
"""

from __future__ import annotations

from mi_at.defenses.standard_at import StandardATWith, options_of
from mi_at.regularizers import ncmi_relaxed


class NCMIRelaxed(StandardATWith):
    """Algorithm 2 on cross-entropy; options, defaults and ranges are those of the regularizer of the same name."""

    __init__ = options_of("ncmi_relaxed", ncmi_relaxed.NCMIRelaxed)
