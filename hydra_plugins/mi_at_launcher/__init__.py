"""Hydra's plugin of mi_at: a launcher for a Ray cluster."""
