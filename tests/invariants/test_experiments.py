"""Every file in configs/experiment composes, and everything in it can be made."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from runs import CONFIGS, built, composed

from aem_lightning.callbacks import AdapterExport, AEMMonitor, StepTime, Transcripts
from aem_lightning.modules import AgentModule, check_dtype
from aem_lightning.rollout import RolloutEngine
from aem_lightning.runner.build import check_parts, load_policy, lora_of
from aem_lightning.runner.checks import check_config
from aem_lightning.runner.trainers import make_trainer

# Those of SWE have their own tests, with their own instances: test_swe_experiments.
EXPERIMENTS = sorted(
    path.stem for path in (CONFIGS / "experiment").glob("*.yaml") if not path.stem.startswith("swe")
)


TESTBEDS = ("corridor", "bait")  # which hold their tasks themselves
# Besides their folder, what small data needs; six training tasks each.
DATA = {
    "webshop": ("datamodule.nouns=given", "datamodule.splits={test:[0,6],train:[6,12]}"),
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_cannot_be_made(
    experiment: str, toy_model: str, alfworld_root: Path, webshop_root: Path, tmp_path: Path
) -> None:
    benchmark = experiment.partition("_")[0]
    root = {"webshop": webshop_root}.get(benchmark, alfworld_root)
    games = [f"datamodule.root={root}", "datamodule.generate=null"]
    cfg = composed(
        [
            f"experiment={experiment}",
            f"policy.model={toy_model}",
            *(games if benchmark not in TESTBEDS else ()),
            *DATA.get(benchmark, ()),
            f"paths.root_dir={tmp_path}",
            f"paths.output_dir={tmp_path}",
            "trainer.accelerator=cpu",
        ]
    )
    assert cfg.name.startswith(experiment)
    check_config(cfg)
    check_parts(cfg)
    with built(cfg) as (trainer, module, datamodule):
        assert isinstance(trainer, L.Trainer)
        assert isinstance(module, AgentModule)
        assert trainer.max_epochs * cfg.iterations_per_epoch == cfg.iterations
        assert isinstance(trainer.logger, TensorBoardLogger)
        found = [type(callback) for callback in trainer.callbacks]
        assert {AEMMonitor, StepTime, Transcripts, AdapterExport} <= set(found)
        assert isinstance(module.engine, RolloutEngine)
        made = module.configure_optimizers()
        trained = [p for group in made["optimizer"].param_groups for p in group["params"]]
        assert {id(p) for p in trained} == {id(p) for p in module.policy.trainable().values()}
        assert all(p.dtype == torch.float32 for p in trained)
        assert len(datamodule.tasks("train")) == 6 or benchmark in TESTBEDS


POLICIES = sorted(path.stem for path in (CONFIGS / "policy").glob("*.yaml") if path.stem != "api")


def test_a_policy_of_the_readme_has_no_file() -> None:
    assert {"tiny", "qwen2_5_0_5b_lora", "qwen2_5_1_5b_lora", "qwen2_5_7b_qlora"} <= set(POLICIES)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_cannot_be_loaded_from_a_folder(name: str, toy_model: str, tmp_path: Path) -> None:
    if name.endswith("qlora"):
        pytest.importorskip("bitsandbytes")
    cfg = composed([f"policy={name}", f"paths.output_dir={tmp_path}"])
    check_config(cfg)
    check_parts(cfg)
    policy = load_policy(cfg, toy_model, lora_of(cfg))
    trained = policy.trainable()
    assert trained
    assert all("lora_" in name and p.shape.count(cfg.policy.lora.r) for name, p in trained.items())
    linear = policy.causal_lm.model.layers[0].mlp.up_proj.base_layer
    assert (type(linear).__name__ == "Linear4bit") == (cfg.policy.quantization == "nf4")
    if cfg.policy.quantization is None:
        assert linear.weight.dtype == check_dtype(cfg.policy.dtype)


def test_half_precision_that_a_processor_computes_slowly_is_told(
    toy_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    where = f"paths.output_dir={tmp_path}"
    for given, instead in {
        "policy.dtype=bfloat16": "policy.dtype=auto",
        "policy.dtype=auto": None,
        "policy.dtype=float32": None,
        "trainer.precision=bf16-mixed": "trainer.precision=null",
        "trainer.precision=32-true": None,
        "trainer=gpu": None,
    }.items():
        caplog.clear()
        cfg = composed([given, where])
        load_policy(cfg, toy_model, lora_of(cfg))
        told = f"{given}: this processor has no unit for it; {instead} is faster"
        assert (told in caplog.text) == ("is faster" in caplog.text) == (instead is not None)
    assert make_trainer(composed(["trainer=gpu", where])).precision == "32-true"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert make_trainer(composed(["trainer=gpu", where])).precision == "bf16-mixed"


def test_the_headline_and_its_base_differ_by_more_than_the_modulation() -> None:
    place = "paths.output_dir=."
    aem, grpo = (composed([f"experiment=alfworld_{name}", place]) for name in ("aem", "grpo"))
    assert {key for key in aem if aem[key] != grpo[key]} == {"name", "arm", "modulation"}
