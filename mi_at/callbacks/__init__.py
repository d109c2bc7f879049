"""Floor 3: what happens around a training step: adversarial examples, weight perturbation, averaging, checkpoints."""
