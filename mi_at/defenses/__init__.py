"""Floor 3: one file per method, each a LightningModule; `base.py` holds what they share."""
