"""Pure tensor functions of the method: entropies, advantages, modulation, losses, returns.

Letters: ``S`` sequences (rows), ``L`` tokens of a row, ``R`` responses, ``N`` trajectories, ``T``
tokens or times. All logarithms are natural, so entropies and log-probabilities are in nats. Nothing
but torch is imported.
"""

from aem_lightning.functional.advantages import (
    gigpo_step_advantages,
    grpo_advantages,
    rloo_advantages,
)
from aem_lightning.functional.entropy import entropy_drift, response_entropy, token_entropy
from aem_lightning.functional.logprob import token_logprob_entropy
from aem_lightning.functional.losses import clipped_surrogate, kl_k3, sequence_ratio
from aem_lightning.functional.modulation import aem_coefficients, empg_gain
from aem_lightning.functional.returns import discounted_returns, gae

__all__ = [
    "aem_coefficients",
    "clipped_surrogate",
    "discounted_returns",
    "empg_gain",
    "entropy_drift",
    "gae",
    "gigpo_step_advantages",
    "grpo_advantages",
    "kl_k3",
    "response_entropy",
    "rloo_advantages",
    "sequence_ratio",
    "token_entropy",
    "token_logprob_entropy",
]
