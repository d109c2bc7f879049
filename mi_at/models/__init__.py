"""Networks with named taps; one file per family, chosen by `conf/model/<name>.yaml`."""

from mi_at.models.base import Classifier, Normalize

__all__ = ["Classifier", "Normalize"]
