"""mi_at: adversarial training with mutual-information methods, one readable file per method.

`mi_at.load(path)` returns a trained network from a checkpoint, `mi_at.robustness(net, data)` attacks any network:

    import mi_at
    result = mi_at.robustness(net, (images, labels), evaluation="standard", eps="8/255")
    print(result)

Both are resolved lazily, so that `import mi_at.functional` and `import mi_at.attacks` need nothing but torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mi_at.version import __version__

if TYPE_CHECKING:
    from mi_at.evaluate import robustness as robustness
    from mi_at.io import load as load

__all__ = ["__version__", "load", "robustness"]

_WHERE = {"load": "mi_at.io", "robustness": "mi_at.evaluate"}


def __getattr__(name: str) -> Any:
    """Import `mi_at.load` and `mi_at.robustness` on first use."""
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'mi_at' has no attribute {name!r}")
