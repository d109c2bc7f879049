"""Floor 1: data sets as Lightning data modules; images are uint8 until the batch, then float in [0, 1].

`batch`, `augment`, `splits`, `seeding` and `loader` need torch alone; `base` and the data sets need
Lightning.
"""

from __future__ import annotations

# Keys of conf/dataset/*.yaml that describe the set's customary threat model and schedule (attack and optim
# interpolate them). They are no options of a data module: remove them before it is instantiated.
CUSTOMARY_KEYS = ("norm", "eps", "step_size", "steps", "epochs", "lr")

__all__ = ["CUSTOMARY_KEYS"]
