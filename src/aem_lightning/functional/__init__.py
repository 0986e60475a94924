"""Pure tensor functions of the method: entropies, advantages, modulation, losses, returns.

Letters: ``S`` sequences (rows), ``L`` tokens of a row, ``R`` responses, ``N`` trajectories, ``T``
tokens or times. All logarithms are natural, so entropies and log-probabilities are in nats. Nothing
but torch is imported.
"""

from aem_lightning.functional.advantages import (
    gigpo_step_advantages,
    grpo_advantages,
    maxrl_advantages,
    qae_advantages,
    rloo_advantages,
    whiten,
)
from aem_lightning.functional.covariance import clip_cov_tokens, kl_cov_tokens, token_covariances
from aem_lightning.functional.entropy import entropy_drift, response_entropy, token_entropy
from aem_lightning.functional.importance import importance_weights
from aem_lightning.functional.logprob import logprob_entropy_through, token_logprob_entropy
from aem_lightning.functional.losses import (
    aggregation_weights,
    cispo_surrogate,
    clipped_surrogate,
    clipped_value_loss,
    dppo_surrogate,
    kl_k3,
    sequence_ratio,
)
from aem_lightning.functional.modulation import (
    aem_coefficients,
    empg_bonus,
    empg_gain,
    repo_advantages,
)
from aem_lightning.functional.paths import graph_rewards, hgpo_advantages
from aem_lightning.functional.returns import (
    discounted_returns,
    gae,
    overlong_penalty,
    step_returns,
    token_gae,
)

__all__ = [
    "aem_coefficients",
    "aggregation_weights",
    "cispo_surrogate",
    "clip_cov_tokens",
    "clipped_surrogate",
    "clipped_value_loss",
    "discounted_returns",
    "dppo_surrogate",
    "empg_bonus",
    "empg_gain",
    "entropy_drift",
    "gae",
    "gigpo_step_advantages",
    "graph_rewards",
    "grpo_advantages",
    "hgpo_advantages",
    "importance_weights",
    "kl_cov_tokens",
    "kl_k3",
    "logprob_entropy_through",
    "maxrl_advantages",
    "overlong_penalty",
    "qae_advantages",
    "repo_advantages",
    "response_entropy",
    "rloo_advantages",
    "sequence_ratio",
    "step_returns",
    "token_covariances",
    "token_entropy",
    "token_gae",
    "token_logprob_entropy",
    "whiten",
]
