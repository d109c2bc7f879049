"""Floor 3: evaluate(net, attacks, batches) -> per-sample outcomes; never imports a defense."""

from mi_at.evaluation.evaluate import evaluate, sizes
from mi_at.evaluation.intervals import wilson
from mi_at.evaluation.outcomes import AttackResult, EvalAttack, EvaluationError, EvaluationResult, Examples

__all__ = [
    "AttackResult",
    "EvalAttack",
    "EvaluationError",
    "EvaluationResult",
    "Examples",
    "evaluate",
    "sizes",
    "wilson",
]
