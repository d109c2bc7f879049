"""Critics that estimate mutual information, and the gradient estimator that needs none."""
