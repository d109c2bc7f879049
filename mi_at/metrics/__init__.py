"""Floor 1: what is accumulated over a data set and over processes (torchmetrics); attacks are not known here."""

from mi_at.metrics.clusters import ConditionalMutualInformation, NormalizedCMI, Separation
from mi_at.metrics.estimates import MutualInformationEstimates

__all__ = ["ConditionalMutualInformation", "MutualInformationEstimates", "NormalizedCMI", "Separation"]
