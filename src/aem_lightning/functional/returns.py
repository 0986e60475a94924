"""Returns over time: discounted sums and generalised advantage estimates."""

from __future__ import annotations

import torch
from torch import Tensor

from aem_lightning.functional.segments import check_rows, check_shapes, segment_sum


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """The discounted sum of rewards from each time on.

    ``G_t = r_t + gamma * G_{t+1}``, with ``G_T = 0``. Source: Sutton and Barto, *Reinforcement
    Learning*, second edition, equation 3.9.

    Args:
        rewards: [..., T].
        gamma: Discount.

    Returns:
        [..., T].

    Example:
        >>> discounted_returns(torch.tensor([0.0, 0.0, 10.0]), 0.5)
        tensor([ 2.5000,  5.0000, 10.0000])
    """
    returns = torch.empty_like(rewards)
    following = torch.zeros_like(rewards[..., 0]) if rewards.shape[-1] else rewards
    for time in range(rewards.shape[-1] - 1, -1, -1):
        following = rewards[..., time] + gamma * following
        returns[..., time] = following
    return returns


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that a value head learns (arXiv 1506.02438).

    ``A_t = delta_t + gamma * lam * A_{t+1}`` with ``delta_t = r_t + gamma * V_{t+1} - V_t``. The
    value after the last time is 0: an episode ends there.

    Args:
        rewards: [..., T].
        values: V_t, same shape.
        gamma: Discount.
        lam: Weight of the longer estimates; 1 gives the discounted return minus the value.

    Returns:
        Advantages and ``returns = advantages + values``, [..., T] each.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> gae(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), gamma=1.0, lam=1.0)
        (tensor([0.5000, 0.5000]), tensor([1., 1.]))
    """
    check_shapes(rewards=rewards, values=values)
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], dim=-1)
    advantages = discounted_returns(rewards + gamma * following - values, gamma * lam)
    return advantages, advantages + values


def step_returns(rewards: Tensor, trajectory: Tensor, turn: Tensor, gamma: float) -> Tensor:
    """The discounted sum of a trajectory's rewards from each of its responses on.

    ``discounted_returns`` for a table of responses: what GiGPO (arXiv 2505.10978) compares among
    the responses to one observation.

    Args:
        rewards: One reward a response, [R].
        trajectory: The trajectory of each, [R], any integers >= 0.
        turn: Its place in time within the trajectory, [R].
        gamma: Discount a turn.

    Returns:
        [R], in the order given.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> rewards, trajectory = torch.tensor([0.0, 10.0, 4.0]), torch.tensor([0, 0, 1])
        >>> step_returns(rewards, trajectory, torch.tensor([0, 1, 0]), gamma=0.5)
        tensor([ 5., 10.,  4.])
    """
    check_rows(rewards=rewards, trajectory=trajectory, turn=turn)
    if not len(rewards):
        return rewards.clone()
    times = rewards.new_zeros(int(trajectory.max()) + 1, int(turn.max()) + 1)  # [N, T]
    times[trajectory, turn] = rewards
    return discounted_returns(times, gamma)[trajectory, turn]


def token_gae(
    rewards: Tensor,
    values: Tensor,
    response_index: Tensor,
    trajectory: Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``gae`` over the response tokens of each trajectory, one turn after the other.

    The times of a trajectory are the tokens of its responses; what the environment says in between
    takes no time. The reward of a response falls on its last token. After the last token of a
    trajectory the value is 0, also where a limit cut it. PPO (arXiv 1707.06347) over tokens.

    Args:
        rewards: One reward a response, [R].
        values: Value before each token, [S, L]; read at response tokens alone.
        response_index: The response of each token, [S, L]; -1 outside responses. Responses are
            numbered in the order of time within their trajectory.
        trajectory: The trajectory of each response, [R], 0..N-1.
        gamma: Discount a token.
        lam: Weight of the longer estimates.

    Returns:
        Advantages and ``returns = advantages + values``, [S, L] each, 0 outside responses.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> index, values = torch.tensor([[-1, 0, 0, -1, 1]]), torch.tensor([[9.0, 1, 2, 9, 3]])
        >>> token_gae(torch.tensor([0.5, 4.0]), values, index, torch.tensor([0, 0]))
        (tensor([[0.0000, 3.5000, 2.5000, 0.0000, 1.0000]]), tensor([[0.0000, 4.5000, 4.5000, 0.0000, 4.0000]]))
    """  # noqa: E501 (a doctest's output cannot be broken)
    check_rows(rewards=rewards, trajectory=trajectory)
    check_shapes(values=values, response_index=response_index)
    inside = response_index >= 0
    responses, order = response_index[inside].sort(stable=True)  # [T], in the order of time
    if not len(responses):
        return torch.zeros_like(values), torch.zeros_like(values)
    owner = trajectory[responses]
    time, lengths = _times(owner, int(trajectory.max()) + 1)
    last = torch.ones_like(responses, dtype=torch.bool)
    last[:-1] = responses[1:] != responses[:-1]
    shape = (len(lengths), int(lengths.max()))
    paid, known = values.new_zeros(shape), values.new_zeros(shape)
    paid[owner, time] = torch.where(last, rewards[responses].to(values.dtype), 0.0)
    known[owner, time] = values[inside][order]
    # Behind the end of a shorter trajectory rewards and values are 0, and so are its advantages.
    found, _ = gae(paid, known, gamma, lam)
    advantages = torch.zeros_like(values)
    advantages[inside] = torch.empty_like(values[inside]).index_copy(0, order, found[owner, time])
    return advantages, torch.where(inside, advantages + values, torch.zeros_like(values))


def _times(owner: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The place of each token among those of its trajectory, [T], and their numbers, [N]."""
    lengths = segment_sum(torch.ones_like(owner), owner, count)
    grouped = owner.argsort(stable=True)
    start = lengths.cumsum(0) - lengths
    places = torch.arange(len(owner), device=owner.device) - start[owner[grouped]]
    return torch.empty_like(places).index_copy(0, grouped, places), lengths


def overlong_penalty(length: Tensor, max_length: int, cache: int) -> Tensor:
    """Soft punishment of responses that come close to the longest one allowed: 0 down to -1.

    ``min(0, max(-1, (max_length - cache - length) / cache))``: 0 up to ``max_length - cache``
    tokens, then linear to -1 at ``max_length``. DAPO (arXiv 2503.14476), equation 13.

    Args:
        length: Tokens of each response, [R].
        max_length: The most tokens that a response may have.
        cache: Tokens before that over which the punishment grows.

    Returns:
        [R], float32.

    Raises:
        ValueError: A cache that is not within 1 to ``max_length``.

    Example:
        >>> overlong_penalty(torch.tensor([50, 80, 90, 100]), max_length=100, cache=20)
        tensor([ 0.0000,  0.0000, -0.5000, -1.0000])
    """
    if not 1 <= cache <= max_length:
        raise ValueError(f"cache={cache} is not allowed: 1 to max_length={max_length} tokens")
    return ((max_length - cache - length.float()) / cache).clamp(-1.0, 0.0)
