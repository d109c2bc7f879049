"""What commands that tests fork find imported: what they would import themselves, each anew."""

import sklearn.datasets
from hydra.core.plugins import Plugins

import mi_at.evaluate
import mi_at.train

__all__ = ["mi_at", "sklearn"]

Plugins.instance()  # Hydra's search for plugins imports every launcher and sweeper
