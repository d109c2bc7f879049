"""Which network and which data a number is of, to tell them from those that came later under the same name.

The weights of a file may be others than yesterday, its class may have been edited, the images may have changed: a
number that was found before, or the half of an evaluation that was interrupted, is then no longer theirs.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from mi_at.attacks.packing import BatchSize, Kept, out_of_memory
from mi_at.evaluation.outcomes import EvaluationError, Identity
from mi_at.evaluation.pieces import Pieces, fingerprint
from mi_at.evaluation.running import clean_logits, input_gradient, isolated, logits_of, spread
from mi_at.functional import random

LOOKED_AT = 20  # images
PERTURBED = 0.1  # linf, in pixels: a network may round its images, which shows on none that are rounded already
IN_PLACE = "the network changes its images in place: let it work on a copy, x = x.clone()"


def identify(
    net: nn.Module, x: Tensor, y: Tensor, index: Tensor, *, device: torch.device, seed: int
) -> tuple[Identity, float, Tensor]:
    """Look at a network's answers to the first few images.

    Args:
        net: prepared, on `device`.
        x: [N, C, H, W] in [0, 1], all samples of the evaluation.
        y: [N] int64.
        index: [N] int64, their places in the split.
        device: of the network.
        seed: of a stochastic network's noise.

    Returns:
        The identity; how far two equal forwards lie apart, at most, in units of the logits' spread; and the
        gradients [k, D].

    Raises:
        EvaluationError: the network fails on the images, or gives what no attack can use.
    """
    few = slice(0, LOOKED_AT)
    generator = torch.Generator().manual_seed(0)
    shift = torch.rand(x[few].shape, generator=generator) * 2 - 1
    toward = torch.randn(x[few].flatten(1).shape, generator=generator)

    def look(x: Tensor, y: Tensor, index: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        here, ids = x.to(device, copy=True), index.to(device)
        logits = clean_logits(net, here, ids, seed)
        if not torch.equal(here.cpu(), x.cpu()):
            raise EvaluationError(IN_PLACE)
        again = clean_logits(net, here, ids, seed)
        perturbed = logits_of(net, (here + PERTURBED * shift.to(here)).clamp(0, 1), ids, seed, "of perturbed images")
        try:
            with random.keyed(ids, random.key(seed, "logits")):
                gradient = input_gradient(net, here, y.clamp(0, logits.shape[1] - 1))
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise EvaluationError(_why_no_gradient(error)) from error
        return logits.cpu(), again.cpu(), perturbed.cpu(), gradient

    with isolated(seed):
        logits, again, perturbed, gradient = BatchSize(LOOKED_AT).map(look, x[few], y[few], index[few], shift)
    answers = torch.cat([logits, perturbed])
    finite = gradient.nan_to_num(0.0, 0.0, 0.0)
    identity = Identity(
        weights=fingerprint(net),
        data=fingerprint(x, y, index),
        logits=_rounded(torch.cat([answers.amax(dim=1), answers.median(dim=1).values])),
        slopes=_rounded(torch.cat([finite.norm(dim=1), (finite * toward.to(finite)).sum(dim=1)])),
    )
    return identity, float((again - logits).abs().max()) / spread(logits), gradient


def key_of(pieces: Pieces, identity: Identity) -> str:
    """What pieces of this network on these samples are named by; those of one whose code was edited are others."""
    key = fingerprint(identity.weights, identity.data)
    mine: Kept = {"identity": json.dumps(identity.plain())}
    number = 0
    while True:
        kept = next(kept for _, kept in pieces.run([f"identity-{key}-{number}"], lambda _: mine))
        if identity.is_that_of(Identity.of_plain(json.loads(str(kept["identity"])))):
            return f"{key}-{number}" if number else key
        number += 1


def _why_no_gradient(error: Exception) -> str:
    if "in-place" in str(error):
        return f"{IN_PLACE} ({error})"
    return f"the network gives no gradient of its images: {error}"


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values.tolist())
