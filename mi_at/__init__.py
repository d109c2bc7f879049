"""mi_at: adversarial training with mutual-information methods, one readable file per method.

`mi_at.load(path)` returns a trained network from a checkpoint; it is resolved lazily, so that
`import mi_at.functional` and `import mi_at.attacks` need nothing but torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mi_at.io import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `mi_at.load` on first use."""
    if name == "load":
        from mi_at.io import load

        return load
    raise AttributeError(f"module 'mi_at' has no attribute {name!r}")
