"""Where in a picture its log-likelihood lies.

The log-density is a sum over tokens: log p(x) = sum_n [log N(z_n; 0, I) - sum over blocks of sum_D log sigma_n]
(STARFlow, arXiv 2506.06276, eq. 3 to 5, read token by token). A block that reads backwards conditions on what
follows, so a token's part is its surprise given what the blocks had read, not its marginal density.
"""

from __future__ import annotations

import math

from torch import Tensor

from starflow.flow.model import Flow
from starflow.flow.tokens import in_order, patchify


def token_log_prob(model: Flow, x: Tensor, condition: Tensor | None = None) -> Tensor:
    """Each token's part of log p(x | condition), in nats: (B, C, H, W) to (B, h, w), which sums to `model.log_prob`.

    Raises:
        UserError: a shape that the model cannot take.
    """
    trace = model.trace(x, condition)
    z_BND = patchify(trace.z, model.config.patch_size, channel_first=model.channel_first)
    nats_BN = -0.5 * (z_BND.square().sum(-1) + z_BND.shape[-1] * math.log(2 * math.pi))
    for block, log_sigma in zip(model.stack(), trace.log_sigmas, strict=True):
        nats_BN = nats_BN - in_order(log_sigma, backwards=block.spec.backwards).sum(-1)
    prior_ND = model.prior_log_std()
    if prior_ND is not None:
        nats_BN = nats_BN - prior_ND.sum(-1)
    patch = model.config.patch_size
    return nats_BN.reshape(len(x), x.shape[2] // patch, x.shape[3] // patch)
