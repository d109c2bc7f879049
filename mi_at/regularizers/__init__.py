"""Floor 2: one file per added term that plugs into any defense."""

from mi_at.regularizers.base import Context, Regularizer

__all__ = ["Context", "Regularizer"]
