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


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def rows(case, *names):
    """A column of floats, and columns of ids."""
    return f64(case[names[0]]), *(torch.tensor(case[name]) for name in names[1:])


def alpha(case, direction):
    options = {"sharpness": case["lam"], "min_range": case["min_range"], "direction": direction}
    return aem_coefficients(*rows(case, "entropy", "group"), **options)


def ratio(case):
    logprobs, old = f64([case["logp"]]), f64([case["old_logp"]])
    return sequence_ratio(logprobs, old, torch.zeros(logprobs.shape, dtype=torch.long), 1)[0]


def drift(case):
    p = f64(case["p"])
    return entropy_drift(f64(case["advantage"]), -p.log()[case["action"]], -(p * p.log()).sum())


def entropy_of_hidden(case):
    head = torch.eye(len(case["logits"]), dtype=torch.float64)
    return token_logprob_entropy(f64([case["logits"]]), head, torch.tensor([0]))[1][0]


STEPS = ("step_return", "group", "anchor")
# By the kind of a case and the key of the oracle's answer: what has to give the same.
CALLS = {
    ("aem", "alpha"): [lambda c: alpha(c, "paper")],
    ("aem", "reversed"): [lambda c: alpha(c, "reversed")],
    ("grpo", "advantage"): [lambda c: grpo_advantages(*rows(c, "returns", "group"))],
    ("grpo", "no_std"): [
        lambda c: grpo_advantages(*rows(c, "returns", "group"), normalize_std=False)
    ],
    ("rloo", "advantage"): [lambda c: rloo_advantages(*rows(c, "returns", "group"))],
    ("gigpo_step", "advantage"): [lambda c: gigpo_step_advantages(*rows(c, *STEPS))],
    ("gigpo_step", "no_std"): [
        lambda c: gigpo_step_advantages(*rows(c, *STEPS), normalize_std=False)
    ],
    ("gspo_ratio", "ratio"): [ratio],
    ("drift", "natural"): [drift],
    ("k3", "k3"): [lambda c: kl_k3(f64(c["logp"]), f64(c["ref_logp"]))],
    ("token_entropy", "entropy"): [lambda c: token_entropy(f64(c["logits"])), entropy_of_hidden],
    ("empg_gain", "gain"): [lambda c: empg_gain(f64(c["entropy"]), k=c["k"])],
    ("discounted", "returns"): [lambda c: discounted_returns(f64(c["rewards"]), c["gamma"])],
}


@pytest.mark.parametrize(("kind", "key"), CALLS)
def test_a_function_differs_from_the_oracle(kind, key):
    assert {kind for kind, _ in CALLS} == set(ORACLE)
    for case in ORACLE[kind]:
        for call in CALLS[kind, key]:
            torch.testing.assert_close(call(case), f64(case[key]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", functional.__all__)
def test_a_public_name_lacks_an_example_shapes_or_the_source_of_its_equation(name):
    text = getattr(functional, name).__doc__
    assert ">>> " in text
    assert re.search(r"\[[A-Z.]|[Ss]ame shape|any shape|coefficient c\b", text), "shapes"
    assert re.search(r"arXiv|Sutton and Barto", text), "a source"
