"""A real chat model, as `make model` makes it, through template, engine, scores and an iteration.

Without the folder, which takes 94 MB from a package index, these tests are skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from models import smollm2
from runs import ROOT, Keep, composed, equal_bits, fit, weights

from aem_lightning.modules import Policy
from aem_lightning.rollout import PromptEncoder, Request, Sampling, SlotEngine
from aem_lightning.runner.build import instantiate
from aem_lightning.types import EnvStep

FOLDER = Path(os.environ.get("SMOLLM2", ROOT / "data" / "models" / "smollm2-135m-instruct"))
real = pytest.mark.skipif(
    not (FOLDER / "config.json").is_file(),
    reason=f"{FOLDER} is not there: `make model` makes it, SMOLLM2=... names another",
)
HALL = EnvStep("You see a desk 1.\n\nYour task is to: put a mug in desk.", info={"goal": "a mug"})


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.from_pretrained(str(FOLDER))


@real
def test_the_template_or_the_end_token_of_the_model_is_another(policy: Policy) -> None:
    prompt = instantiate(composed(["experiment=alfworld_smollm2"]).prompt)
    encoder = PromptEncoder(policy.tokenizer, prompt, "transcript")
    assert encoder.stop_ids == (policy.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    asked = [
        {"role": "system", "content": prompt.system},
        {"role": "user", "content": HALL.observation},
    ]
    whole = policy.tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_dict=False
    )
    assert encoder.first(HALL) == whole
    said = encoder.demonstrate("go to desk 1", "I look for the mug.")
    assert prompt.parse(encoder.decode(said)) == "go to desk 1"
    embeddings = policy.causal_lm.get_input_embeddings().weight
    assert embeddings is policy.causal_lm.get_output_embeddings().weight


@real
def test_the_engine_and_the_models_own_logits_differ(policy: Policy) -> None:
    engine = SlotEngine(slots=3, max_length=128)
    engine.sync(policy, 0)
    sampling = Sampling(temperature=1.0, max_new_tokens=12)
    asked = ("Name a fruit.", "What is the capital of France? One word.", "Count to five: 1, 2,")
    prompts = [
        policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in asked
    ]
    engine.submit(Request(str(i), prompt, sampling, i) for i, prompt in enumerate(prompts))
    for result, prompt in zip(engine.poll(wait_all=True), prompts, strict=True):
        row = torch.tensor([[*prompt, *result.tokens]])
        with torch.no_grad():
            logits = policy.causal_lm(row).logits[0, len(prompt) - 1 : -1]
            mask = torch.arange(row.shape[1])[None] >= len(prompt)
            scored, entropies = policy.score(row, mask)
        own = logits.log_softmax(-1)
        told = own.gather(1, row[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.logprobs), told, atol=1e-3, rtol=0)
        torch.testing.assert_close(scored, told, atol=1e-3, rtol=0)
        of_own = -(own.exp() * own).sum(-1)
        torch.testing.assert_close(torch.tensor(result.entropies), of_own, atol=1e-3, rtol=0)
        torch.testing.assert_close(entropies, of_own, atol=1e-3, rtol=0)


@real
def test_an_iteration_leaves_the_model_as_it_was(alfworld_root: Path, tmp_path: Path) -> None:
    overrides = [
        *("experiment=alfworld_smollm2", f"policy.model={FOLDER}", "policy.dtype=float32"),
        *(f"datamodule.root={alfworld_root}", "datamodule.generate=null", "datamodule.workers=1"),
        *("iterations=1", "tasks_per_iteration=1", "group_size=2", "max_turns=2"),
        *("max_new_tokens=6", "num_minibatches=1", "concurrency=2", "callbacks=[]"),
        *("datamodule.validation_tasks=1", f"paths.root_dir={tmp_path}"),
        *(f"paths.output_dir={tmp_path}", "loss.entropy_coef=0.1"),  # a group of losses has none
    ]
    seen, before = Keep(), {}
    module = fit(
        composed(overrides), prepare=lambda made: before.update(weights(made)), callbacks=[seen]
    )
    (iteration,) = seen.iterations
    assert len(iteration.trajectories) == 2
    assert iteration.metrics["policy/sampler_gap"] < 1e-4
    assert not equal_bits(before, weights(module))


@pytest.mark.skipif(
    not (smollm2.KEPT / "run.json").is_file(),
    reason="no run was kept: python -m models.smollm2 <run> does",
)
def test_the_page_tells_another_run_than_the_one_that_was_kept() -> None:
    kept = json.loads((smollm2.KEPT / "run.json").read_text(encoding="utf-8"))
    told = smollm2.page()
    for name in ("success_before", "success_after"):
        found = kept[name]
        rate, low, high = (f"{100 * found[part]:.1f}" for part in ("rate", "low", "high"))
        assert f"{rate} % [{low}, {high}] of 60 |" in told
    assert told.count("**Before: ") == 1
    assert told.count("**After iteration ") == 2
    assert (smollm2.KEPT / "curve.png").read_bytes().startswith(b"\x89PNG")
