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
from omegaconf import OmegaConf
from runs import ROOT, Keep, composed, equal_bits, fit, weights
from torch.utils.tensorboard import SummaryWriter

from aem_lightning.callbacks.transcripts import append_json_line, episode_record
from aem_lightning.modules import Policy
from aem_lightning.rollout import PromptEncoder, Request, Sampling, SlotEngine
from aem_lightning.runner.build import instantiate
from aem_lightning.types import EnvStep, Task, Trajectory

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


# ------------------------------------------------------------------------------------------- page


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a run of six iterations, whose warm start began with what another one left."""
    run, earlier = tmp_path / "run", tmp_path / "earlier"
    earlier.mkdir()
    before = {"settings": {"demonstrations": 70, "base": None}}
    (earlier / "warm_start.json").write_text(json.dumps(before))
    with SummaryWriter(str(run / "tensorboard")) as writer:
        for tag in smollm2.CURVES:
            for x in range(6):
                writer.add_scalar(tag, 0.1 * x, x)
    part = {"episodes": 60, "by_type": {}}
    summary = {
        "success_before": {"rate": 0.25, "low": 0.158, "high": 0.372, **part},
        "success_after": {"rate": 0.6, "low": 0.474, "high": 0.714, **part},
        **{"iterations": 6, "seed": 0, "verdict": None, "seconds": {"training": 60.0}},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "run.json").write_text(json.dumps({"device": "2 × CPU, 1 threads"}))
    (run / ".hydra").mkdir()
    cfg = composed(["experiment=alfworld_smollm2", f"policy.warm_start.base={earlier}"])
    OmegaConf.save(cfg, run / ".hydra" / "config.yaml")
    turn = {"observation": "You see a mug.\n\nYour task.", "tokens": 3, "finish_reason": "stop"}
    turn |= dict.fromkeys(("reward", "entropy", "advantage", "alpha"))
    said = {"response": "<think>a</think>", "action": None, "valid": False}
    for stage, iteration, won in [
        *(("test", None, True), ("test", None, False), ("train", 0, True), ("validate", 2, True)),
        *(("test", 5, True), ("test", 5, False), ("test", 5, True)),
    ]:
        task = Task(f"{stage}/{iteration}", "look", "valid_unseen")
        record = episode_record(Trajectory(task, 0, 0, won=won))
        record |= {"stage": stage, "iteration": iteration, "turns": [turn | said]}
        append_json_line(run / "transcripts.jsonl", record)
    return run


def test_the_page_tells_other_figures_than_the_runs(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "KEPT", tmp_path / "kept")
    assert "No run has been kept yet" in smollm2.page()
    smollm2.keep(finished)
    told = smollm2.page()
    assert "| unseen games won before reinforcement | 25.0 % [15.8, 37.2] of 60 |" in told
    assert "| after | 60.0 % [47.4, 71.4] of 60 |" in told
    assert "these two do not overlap" in told
    assert "| training episodes won | 0.100 in the first 3 iterations, 0.400 in the last |" in told
    assert "| expert episodes that it imitated | 70, then 450 |" in told
    assert "| iterations, episodes | 6, 288 |" in told
    assert "| reinforcement, hours on 2 × CPU, 1 threads | " in told
    assert [line for line in told.splitlines() if line.startswith("**")] == [
        "**Before: lost in 1 turns**",
        *["**After 6 iterations: won in 1 turns**"] * 2,
    ]
    assert "    > <think>a</think>    (malformed)\n" in told
    assert (tmp_path / "kept" / "curve.png").read_bytes().startswith(b"\x89PNG")
