"""A short form of ``make fuzz``, and that what passes it can really be built."""

import random

import pytest
from fuzz_commands import Fuzz, faults
from hydra import initialize_config_dir
from runs import CONFIGS, built, composed, toy_config

from aem_lightning.runner.build import check_parts
from aem_lightning.runner.early import check_training

PLATEAU = "torch.optim.lr_scheduler.ReduceLROnPlateau"


@pytest.fixture
def configs():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def test_a_command_line_ends_in_a_traceback_or_in_an_error_without_its_key(configs, tmp_path):
    ends = [*faults(50, 0, tmp_path)]
    assert [line for line in ends if line[2] not in ("run", "named")] == []
    assert {end for _, _, end in ends} == {"run", "named"}


# By issue: what ended in a traceback, what named no key, what showed late, what never showed.
@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("optimizer=null", "optimizer=null: a mapping of keys to values"),
        ("scheduler.factor='a'", "scheduler.factor='a': a number, e.g. scheduler.factor="),
        ("trainer.devices=false", "trainer.devices=False: "),
        ("trainer.accelerator=abacus", "trainer: .* Given: trainer.accelerator='abacus'"),
        ("policy.chat_template={}", "policy.chat_template={}: a text or null"),
        ("optimizer.betas=[1]", "optimizer.betas=[1]"),
        ("callbacks=[[]]", "callbacks=[[]]: there is no such option"),
        (
            "callbacks.best_checkpoint.mode=most",
            "callbacks.best_checkpoint: .* callbacks.best_checkpoint.mode='most'",
        ),
        ("loss.adaptive_entropy=[]", "loss.adaptive_entropy=[]: "),
        ("loss.covariance={_target_: aem_lightning.algorithms.AEM}", "does not fit there"),
        ("advantage.eps=abc", "advantage.eps='abc': a number >= 0, e.g. advantage.eps=1e-06"),
        ("advantage.normalize_std=1", "advantage.normalize_std=1: true or false"),
        ("engine.max_length=nan", "engine.max_length=nan: a whole number of at least 1"),
        ("datamodule.iterations_per_epoch=0", "datamodule.iterations_per_epoch=0: a whole number"),
        ("datamodule.generate.sizes.train=0", "datamodule.generate.sizes.train=0: a whole number"),
        (
            "+datamodule.generate.sise=0",
            "datamodule.generate.sise: there is no such key. Allowed: ",
        ),
        ("optimizer._target_=torch.optim.LBFGS", "optimizer.weight_decay=0.0: there is no such"),
        ("~optimizer.lr", "optimizer.lr is not given: type +optimizer.lr=2e-5"),
        ("~policy.lora.r", "policy.lora.r is not given: type +policy.lora.r=..."),
        ("seed=1.5", "seed=1.5: a whole number from 0"),
        ("seed='${nope}'", "seed: Interpolation key 'nope' not found"),
        ("+trainer.gradient_clip_val=1.0", "trainer.gradient_clip_val=1.0: .* type max_grad_norm="),
        ("+trainer.limit_val_batches=0", "trainer.limit_val_batches=0: .* datamodule.validation_"),
        ("trainer.precision=bf16-true", "trainer.precision=bf16-true .* type trainer.precision=bf"),
        ("trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch=0: a whole number"),
    ],
)
def test_a_wrong_value_is_told_late_or_without_its_key(typed, told, configs, tmp_path):
    said = Fuzz(tmp_path, random.Random(0)).verdict("train", [typed])
    assert all(part in said for part in told.split(" .* ")), said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ("optimizer._target_=torch.optim.LBFGS", "~optimizer.weight_decay"),
            "optimizer._target_=",
        ),
        ((f"scheduler._target_={PLATEAU}", "scheduler.factor=0.5"), "scheduler._target_="),
    ],
)
def test_a_part_that_asks_for_more_than_there_is_fails_after_an_iteration(
    words, told, configs, tmp_path
):
    said = Fuzz(tmp_path, random.Random(0)).verdict("train", words)
    assert told in said
    assert "calls step() with nothing" in said


@pytest.mark.parametrize(
    "words",
    [
        ("optimizer._target_=torch.optim.SGD", "scheduler=linear", "max_grad_norm=inf"),
        ("algorithm=ppo", "loss=kl_cov", "callbacks=curriculum", "logger=[csv,tensorboard]"),
        ("algorithm=dapo", "modulation=empg_aem", "+optimizer.betas=[0.9,0.99]", "name=3"),
        ("+trainer.max_time=00:01:00:00", "+trainer.detect_anomaly=true", "callbacks.aem=null"),
    ],
)
def test_what_passes_is_not_what_can_be_built(words, toy_model, tmp_path):
    cfg = toy_config(tmp_path, toy_model, *words)
    check_training(cfg)
    check_parts(cfg)
    with built(cfg) as (trainer, module, _):
        assert trainer.max_epochs == 2
        assert module.configure_optimizers()


def test_every_experiment_passes_its_own_schema():
    for experiment in ("quickstart", "webshop_quickstart", "swe_quickstart"):
        check_parts(composed([f"experiment={experiment}", "paths.output_dir=."]))
