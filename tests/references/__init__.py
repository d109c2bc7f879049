"""Slow, literal transcriptions of the papers' equations, in float64."""
