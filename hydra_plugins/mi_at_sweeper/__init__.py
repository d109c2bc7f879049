"""Hydra's plugin of mi_at: a sweeper for the cells of a table."""
