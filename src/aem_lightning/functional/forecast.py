"""The forecast of what AEM will do: do the decisive turns come with confidence, or without?"""

from __future__ import annotations

import torch

from aem_lightning.functional.advantages import gigpo_step_advantages, grpo_advantages
from aem_lightning.functional.returns import step_returns
from aem_lightning.functional.segments import segment_ids, segment_sum
from aem_lightning.types import RolloutBatch


def forecast_sums(batch: RolloutBatch) -> dict[str, float]:
    """What the forecast is made of: sums for a correlation, which add up over ranks and batches.

    Over the responses whose group earned unlike returns and met their observation at least twice:
    the mean token entropy H-bar, and the size of the step advantage A_S of GiGPO, which says how
    much hangs on the choice.

    Source: the hypothesis that AEM moves the step from uncertain turns to confident ones
    (docs/predictions.md), for which GiGPO's A_S (arXiv 2505.10978) says which are decisive.

    Args:
        batch: Its entropies are known; broken episodes are left out.

    Returns:
        ``forecast_n`` of them, the sums ``forecast_h`` and ``forecast_a`` of H-bar and of the size
        of A_S, and ``forecast_hh``, ``forecast_aa`` and ``forecast_ha`` of their products.
    """
    judged = batch.judged[batch.trajectory] & (batch.length > 0)
    group, anchor = batch.response_group, batch.anchor
    following = step_returns(batch.reward, batch.trajectory, batch.turn, gamma=0.95)
    size = gigpo_step_advantages(following, group, anchor, mask=judged).abs()
    ids, count = segment_ids(group, anchor)
    met = segment_sum(judged.float(), ids, count)[ids]
    mixed = grpo_advantages(batch.returns, batch.group, mask=batch.judged) != 0
    groups, many = segment_ids(batch.group)
    mixed = (segment_sum(mixed.float(), groups, many) > 0)[groups]
    chosen = judged & (met > 1) & mixed[batch.trajectory]
    h, a = batch.entropy[chosen].double(), size[chosen].double()
    summed = {"n": torch.ones_like(h), "h": h, "a": a, "hh": h * h, "aa": a * a, "ha": h * a}
    sums = torch.stack([values.sum() for values in summed.values()]).tolist()
    return {f"forecast_{name}": value for name, value in zip(summed, sums, strict=True)}
