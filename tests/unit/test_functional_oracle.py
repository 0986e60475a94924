"""Every function against vectors from an independent implementation, in float64."""

import json
import re
from pathlib import Path

import pytest
import torch

from aem_lightning import functional
from aem_lightning.functional import (
    aem_coefficients,
    discounted_returns,
    empg_gain,
    entropy_drift,
    gigpo_step_advantages,
    grpo_advantages,
    kl_k3,
    rloo_advantages,
    sequence_ratio,
    token_entropy,
    token_logprob_entropy,
)

ORACLE = json.loads((Path(__file__).parents[1] / "vectors" / "oracle.json").read_text())


def cases(name):
    return pytest.mark.parametrize("case", ORACLE[name], ids=range(len(ORACLE[name])))


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(got, expected):
    torch.testing.assert_close(got, f64(expected), rtol=1e-9, atol=1e-9)


@cases("aem")
def test_aem_coefficients_match_the_oracle_in_both_directions(case):
    for direction, expected in (("paper", case["alpha"]), ("reversed", case["reversed"])):
        alpha = aem_coefficients(
            f64(case["entropy"]),
            torch.tensor(case["group"]),
            sharpness=case["lam"],
            min_range=case["min_range"],
            direction=direction,
        )
        assert_equal(alpha, expected)


@cases("grpo")
def test_grpo_advantages_match_the_oracle_with_and_without_std(case):
    returns, group = f64(case["returns"]), torch.tensor(case["group"])
    assert_equal(grpo_advantages(returns, group), case["advantage"])
    assert_equal(grpo_advantages(returns, group, normalize_std=False), case["no_std"])


@cases("rloo")
def test_rloo_advantages_match_the_oracle(case):
    assert_equal(
        rloo_advantages(f64(case["returns"]), torch.tensor(case["group"])), case["advantage"]
    )


@cases("gigpo_step")
def test_gigpo_step_advantages_match_the_oracle_with_and_without_std(case):
    rows = f64(case["step_return"]), torch.tensor(case["group"]), torch.tensor(case["anchor"])
    assert_equal(gigpo_step_advantages(*rows), case["advantage"])
    assert_equal(gigpo_step_advantages(*rows, normalize_std=False), case["no_std"])


@cases("gspo_ratio")
def test_sequence_ratio_matches_the_oracle(case):
    logprobs, old = f64([case["logp"]]), f64([case["old_logp"]])
    ratio = sequence_ratio(logprobs, old, torch.zeros(logprobs.shape, dtype=torch.long), 1)
    assert_equal(ratio, [case["ratio"]])


@cases("drift")
def test_entropy_drift_matches_the_oracle_natural_gradient(case):
    p = f64(case["p"])
    surprisal = -p.log()[case["action"]]
    entropy = -(p * p.log()).sum()
    assert_equal(entropy_drift(f64(case["advantage"]), surprisal, entropy), case["natural"])


@cases("k3")
def test_kl_k3_matches_the_oracle(case):
    assert_equal(kl_k3(f64(case["logp"]), f64(case["ref_logp"])), case["k3"])


@cases("token_entropy")
def test_token_entropy_matches_the_oracle_from_logits_and_from_hidden_states(case):
    logits = f64(case["logits"])
    assert_equal(token_entropy(logits), case["entropy"])
    _, entropy = token_logprob_entropy(
        logits[None], torch.eye(len(logits), dtype=torch.float64), torch.tensor([0])
    )
    assert_equal(entropy, [case["entropy"]])


@cases("empg_gain")
def test_empg_gain_matches_the_oracle(case):
    assert_equal(empg_gain(f64(case["entropy"]), k=case["k"]), case["gain"])


@cases("discounted")
def test_discounted_returns_match_the_oracle(case):
    assert_equal(discounted_returns(f64(case["rewards"]), case["gamma"]), case["returns"])


@pytest.mark.parametrize("name", functional.__all__)
def test_a_public_name_lacks_an_example_shapes_or_the_source_of_its_equation(name):
    text = getattr(functional, name).__doc__
    assert ">>> " in text
    assert re.search(r"\[[A-Z.]|[Ss]ame shape|any shape|coefficient c\b", text), "shapes"
    assert re.search(r"arXiv|Sutton and Barto", text), "a source"
