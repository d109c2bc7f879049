"""Floor 0: pure functions of tensors; torch only."""
