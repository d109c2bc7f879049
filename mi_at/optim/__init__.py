"""Floor 1: the optimiser and the learning-rate schedule, from the numbers of conf/optim and a recipe."""

from mi_at.optim.optimisation import SGD, Adam, Optimisation

__all__ = ["SGD", "Adam", "Optimisation"]
