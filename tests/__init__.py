"""Tests; the tree mirrors mi_at/."""
