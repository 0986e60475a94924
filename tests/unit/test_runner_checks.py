import errno
import json
import os
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from runs import composed

from aem_lightning.runner import build, cli
from aem_lightning.runner.build import instantiate
from aem_lightning.runner.checkpoints import find_checkpoint
from aem_lightning.runner.checks import ConfigError, check_config
from aem_lightning.runner.summary import StageClock, print_results, write_summary
from aem_lightning.runner.warm_start import WarmStart

RESULT = {
    "rate": 0.5,
    "low": 0.25,
    "high": 0.75,
    "episodes": 8,
    "by_type": {"pick": {"rate": 1.0, "low": 0.5, "high": 1.0, "episodes": 4}},
}


SHARED = "trainer=fsdp engine=vllm"


@pytest.fixture(scope="module")
def quickstart():
    return composed(["experiment=quickstart", "paths.output_dir=/nonexistent"])


def changed(cfg, **changes):
    copy = cfg.copy()
    for name, value in changes.items():
        OmegaConf.update(copy, name.replace("__", "."), value)
    return copy


# ------------------------------------------------------------------------------------------ checks


def test_the_config_of_the_quickstart_has_no_problems_and_may_evaluate_greedily(quickstart):
    check_config(quickstart)
    check_config(changed(quickstart, eval_temperature=0))


def test_an_option_without_a_default_is_asked_for_by_name():
    cfg = composed(["datamodule=gymnasium", "paths.output_dir=/nonexistent"])
    with pytest.raises(
        ConfigError, match=r"datamodule\.env_id is not given: type datamodule\.env_id="
    ):
        check_config(cfg)


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("iterations", 0, "at least 1"),
        ("group_size", 2.5, "at least 1"),
        ("max_turns", True, "at least 1"),
        ("max_context", "long", "at least 1"),
        ("memory", "forever", "memory=window, memory=transcript"),
        ("stage", "test", "stage=train, stage=warm_start"),
        ("temperature", 0, "a number > 0"),
        ("temperature", float("nan"), "a number > 0"),
        ("eval_temperature", -1, "a number >= 0"),
        ("max_grad_norm", "big", "a number > 0"),
        ("history_length", -1, "a whole number >= 0"),
        ("collection_rounds", 0, "at least 1"),
        ("anchor_similarity", 0.0, "a number in (0, 1]"),
        ("overlap_share", 1.5, "a number from 0 to 1"),
        ("max_context", 12, "type max_context=48"),
        ("policy__warm_start__required", False, "policy=tiny"),
        ("policy__warm_start__demonstrations", 0, "a whole number of at least 1"),
        ("policy__warm_start__lr", 0, "a number > 0"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(quickstart, name, value, advice):
    with pytest.raises(ConfigError) as error:
        check_config(changed(quickstart, **{name: value}))
    (problem,) = str(error.value).splitlines()[1:]
    assert advice in problem
    if "__" not in name:
        assert f"{name}={value!r}" in problem


@pytest.mark.parametrize(
    ("given", "told", "mended"),
    [
        (
            "loss=kl_cov update_epochs=1 num_minibatches=1",
            "loss=kl_cov does nothing .* type num_minibatches=2",
            "num_minibatches=2",
        ),
        ("algorithm=ppo modulation=empg", "PPO has one a token: type .*aem", "modulation=aem"),
        ("algorithm=ppo modulation=empg_aem", "PPO has one a token", "modulation=none"),
        ("algorithm=dapo advantage=gigpo", "GiGPO has not: type advantage=grpo", "advantage=grpo"),
        (
            "algorithm=dapo loss=custom loss._target_=my.Loss",
            "the clipped loss has, and Loss is another loss: type algorithm=grpo",
            "algorithm=grpo",
        ),
        ("algorithm=drgrpo advantage=rloo", "RLOO has not", "advantage=gigpo"),
        ("algorithm=gspo loss=clip_cov", "one ratio for all tokens", "loss=clipped"),
        ("algorithm=dapo group_size=1", "that is every group: type group_size=8", "group_size=8"),
        (
            "datamodule=swe_embedded prompt=swe_functions datamodule.environment.dialect=bash",
            "dialect=bash does not read .* type prompt=swe_bash",
            "prompt=swe_bash",
        ),
        (
            "datamodule=swe_embedded prompt=swe_bash",
            "dialect=functions does not read .*blocks of bash",
            "datamodule.environment.dialect=bash",
        ),
        ("trainer=fsdp", "engine.cache=auto: .* type engine=vllm", "engine=vllm"),
        ("trainer=fsdp engine=hf", "engine.cache=slots: .* type engine=vllm", "trainer=ddp"),
        ("trainer=fsdp engine=plain", "engine.cache=plain: .* type engine=vllm", "engine=vllm"),
        (
            f"{SHARED} policy.quantization=nf4",
            "type policy.quant.*=null",
            "policy.quantization=null",
        ),
        (f"{SHARED} algorithm=ppo", "advantage=ppo: .* type algorithm=grpo", "algorithm=grpo"),
        (f"{SHARED} trainer.devices=1", "has no other: type trainer=gpu", "trainer.devices=auto"),
        (f"{SHARED} stage=warm_start", "one device, .* type trainer=gpu", "trainer=gpu"),
        (f"{SHARED} preflight=only", "rank 0 does it alone, .* type", "preflight=auto"),
        ("trainer.num_nodes=2", "started by torchrun or srun", "trainer.num_nodes=1"),
    ],
)
def test_parts_that_make_no_sense_together_are_not_refused(given, told, mended):
    words = ["experiment=quickstart", *given.split(), "paths.output_dir=/nonexistent"]
    with pytest.raises(ConfigError, match=told):
        check_config(composed(words))
    check_config(composed([*words, mended]))


@pytest.mark.parametrize("precision", ["16-mixed", "16"])
def test_half_precision_that_needs_a_scaled_loss_is_refused_before_the_first_rollout(precision):
    given = ["experiment=quickstart", "paths.output_dir=/nonexistent"]
    with pytest.raises(ConfigError, match=r"precision=16.* type trainer\.precision=bf16-mixed"):
        check_config(composed([*given, f"trainer.precision={precision}"]))
    check_config(composed([*given, "trainer=gpu"]))


def test_every_problem_is_told_at_once(quickstart):
    wrong = {"iterations": 0, "group_size": -1, "memory": "x", "temperature": -2.0}
    with pytest.raises(ConfigError) as error:
        check_config(changed(quickstart, **wrong))
    message = str(error.value)
    assert all(f"{name}={value!r}" in message for name, value in wrong.items())
    assert len(message.splitlines()) == 1 + len(wrong)


# ------------------------------------------------------------------------------------- checkpoints


def checkpoint(logs, name, time, modified):
    path = logs / name / time / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (modified, modified))
    return path


def wish(logs, ckpt_path):
    return OmegaConf.create({"ckpt_path": ckpt_path, "paths": {"log_dir": str(logs)}})


def test_last_is_the_newest_checkpoint_of_the_runs_with_that_name(tmp_path):
    older = checkpoint(tmp_path, "mine", "2", modified=100)
    newer = checkpoint(tmp_path, "mine", "1", modified=200)
    other = checkpoint(tmp_path, "other", "1", modified=300)
    assert find_checkpoint(wish(tmp_path, "last"), "mine") == newer
    assert find_checkpoint(wish(tmp_path, "last"), None) == other
    assert find_checkpoint(wish(tmp_path, str(older)), "mine") == older
    assert find_checkpoint(wish(tmp_path, None), "mine") is None


@pytest.mark.parametrize("name", ["pens", "seeds/one", "lr[1e-4]", "my pens", "a*?", "[!x]"])
@pytest.mark.parametrize("job", ["2031", "multirun_2031/1", "multirun_2031/a=1/b"])
def test_last_passes_over_a_run_for_its_name_or_place(name, job, tmp_path):
    checkpoint(tmp_path, "pens_other", "2030", modified=100)
    checkpoint(tmp_path, "ax", "2030", modified=200)
    newest = checkpoint(tmp_path, name, job, modified=300)
    assert find_checkpoint(wish(tmp_path, "last"), name) == newest
    assert find_checkpoint(wish(tmp_path, "last"), None) == newest
    with pytest.raises(FileNotFoundError, match="has a checkpoint yet"):
        find_checkpoint(wish(tmp_path, "last"), name.partition("/")[0] + "_")
    if "/" in name:
        with pytest.raises(FileNotFoundError):
            find_checkpoint(wish(tmp_path, "last"), "seeds")


def test_a_job_of_a_sweep_goes_on_from_another_job(tmp_path, monkeypatch):
    jobs = [checkpoint(tmp_path, "mine", f"multirun_1/{i}", modified=100 + i) for i in range(2)]
    checkpoint(tmp_path, "mine", "multirun_2/0", modified=300)  # of this sweep
    sweep = {"dir": str(tmp_path / "mine" / "multirun_2"), "subdir": 0}
    hydra = OmegaConf.create({"sweep": sweep, "mode": RunMode.MULTIRUN})
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: hydra)
    assert find_checkpoint(wish(tmp_path, "last"), "mine") == jobs[0]
    hydra.sweep.subdir = 2
    with pytest.raises(FileNotFoundError, match=r"job 2 of the sweep in .*multirun_1 has no"):
        find_checkpoint(wish(tmp_path, "last"), "mine")


def test_a_checkpoint_is_found_from_any_working_directory(tmp_path, monkeypatch):
    path = checkpoint(tmp_path, "mine", "1", modified=1)
    monkeypatch.chdir(tmp_path)
    relative = wish(Path("."), "mine/1/checkpoints/last.ckpt")
    assert find_checkpoint(relative, None) == path
    assert find_checkpoint(wish(Path("."), "last"), None).is_absolute()


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    checkpoint(tmp_path, "other", "1", modified=1)
    with pytest.raises(FileNotFoundError, match=r"ckpt_path=last: no run under .*mine"):
        find_checkpoint(wish(tmp_path, "last"), "mine")
    with pytest.raises(FileNotFoundError, match=r"ckpt_path=/no/such\.ckpt: .*no such file"):
        find_checkpoint(wish(tmp_path, "/no/such.ckpt"), None)


# ------------------------------------------------------------------------------------ clear errors


class HydraRuntime:
    """Where Hydra says that the run's folder is."""

    def __init__(self, folder):
        self.runtime = OmegaConf.create({"output_dir": str(folder)})


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: HydraRuntime(tmp_path))
    return tmp_path


def test_what_a_person_can_mend_ends_with_its_message_and_keeps_the_traceback(run_folder, caplog):
    with pytest.raises(SystemExit) as ended, cli.clear_errors():
        raise FileNotFoundError("type this instead")
    assert ended.value.code == 1
    assert "type this instead" in caplog.text
    assert "Traceback" not in caplog.text
    assert "Traceback" in (run_folder / "error.log").read_text()


def test_the_cause_is_shown_and_not_what_hydra_wraps_around_it(run_folder, caplog):
    node = {"_target_": "aem_lightning.algorithms.AEM", "min_range": -1}
    with pytest.raises(SystemExit), cli.clear_errors():
        instantiate(node)
    assert caplog.messages[-1].startswith("modulation.min_range=-1")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux that is always full")
def test_a_full_disk_says_where_else_to_write_and_how_to_go_on(run_folder, caplog):
    with pytest.raises(SystemExit) as ended, cli.clear_errors():
        Path("/dev/full").write_text("summary")
    assert ended.value.code == 1
    assert caplog.messages[-1].startswith("The disk is full: ")
    assert "paths.root_dir=" in caplog.text
    assert "ckpt_path=last" in caplog.text


def test_a_full_disk_is_recognised_behind_the_words_of_a_library(run_folder, caplog):
    error = RuntimeError("cannot serialise")
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(SystemExit), cli.clear_errors():
        raise error
    assert "The disk is full: cannot serialise" in caplog.text


def test_a_traceback_that_cannot_be_kept_does_not_hide_the_message(run_folder, caplog):
    (run_folder / "error.log").mkdir()
    with pytest.raises(SystemExit) as ended, cli.clear_errors():
        raise ValueError("type this instead")
    assert ended.value.code == 1
    assert "type this instead\n(no traceback: " in caplog.text


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), cli.clear_errors():
        _ = 1 / 0


# ----------------------------------------------------------------------------------------- summary


def test_stages_are_timed_in_their_order_and_added_up():
    clock = StageClock()
    for stage in ("tasks", "training", "tasks"):
        with clock(stage):
            sum(range(1000))
    assert list(clock.seconds) == ["tasks", "training"]
    with pytest.raises(ValueError, match="stop"), clock("broken"):
        raise ValueError("stop")
    assert clock.seconds["broken"] > 0


def test_the_table_shows_rates_intervals_and_types(capsys):
    other = {**RESULT, "by_type": {}}
    print_results("title", {"success_before": other, "success_after": RESULT})
    lines = capsys.readouterr().out.splitlines()
    every = next(line for line in lines if "all" in line)
    assert every.count("50.0 %") == 2
    assert "[25.0, 75.0]" in every
    pick = next(line for line in lines if "pick" in line)
    assert "–" in pick
    assert "100.0 %" in pick
    assert any("success before" in line for line in lines)


def test_a_summary_is_written_as_json_and_shown(tmp_path, capsys):
    summary = {
        "name": "quickstart",
        "iterations": 60,
        "success_before": RESULT,
        "success_after": RESULT,
        "seconds": {"warm_start": 61.2, "training": 1234.5},
        "paths": {"run": str(tmp_path)},
        "next": ["python eval.py ckpt_path=last"],
    }
    path = write_summary(tmp_path, summary)
    assert json.loads(path.read_text()) == summary
    shown = capsys.readouterr().out
    assert "quickstart: 60 iterations" in shown
    assert "1,23" in shown
    assert "warm start" in shown
    assert f"run: {tmp_path}" in shown.replace("\n", "")
    assert "next: python eval.py ckpt_path=last" in shown


def test_a_run_without_evaluation_has_a_summary_too(tmp_path, capsys):
    summary = {"success_before": None, "seconds": {}, "paths": {}, "next": []}
    assert write_summary(tmp_path, summary).is_file()
    assert "success rate" not in capsys.readouterr().out


# -------------------------------------------------------------------------------------- warm start


@pytest.fixture
def warm_start_folder(quickstart, monkeypatch):
    """The folder that a config's warm start goes to, without running it."""
    monkeypatch.setattr(build, "tiny_base", lambda *given: None)
    monkeypatch.setattr(build, "build_encoder", lambda *given: None)

    def stand_in(*given, folder, **options):
        return WarmStart(folder, False, 0.0, {})

    monkeypatch.setattr(build, "run_warm_start", stand_in)
    return lambda **changes: build.warm_start(changed(quickstart, **changes), None).folder


@pytest.mark.parametrize(
    "changes",
    [
        {"policy__warm_start__lr": 0.5},
        {"policy__warm_start__seed": 3},
        {"policy__architecture__hidden_size": 8},
        {"prompt__turn": "say {observation}"},
        {"memory": "window"},
        {"policy__warm_start__max_turns": 7},
        {"policy__warm_start__max_turns": None, "max_turns": 7},
        {"datamodule__generate__difficulty": "hard"},
    ],
)
def test_a_warm_start_is_made_anew_when_what_it_depends_on_changes(warm_start_folder, changes):
    assert warm_start_folder(**changes) != warm_start_folder()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 5},
        {"iterations": 3},
        {"max_turns": 7},  # the quickstart's demonstrations have a limit of their own
        {"group_size": 16},
        {"tasks_per_iteration": 2},
        {"optimizer__lr": 0.5},
        {"policy__lora__r": 64},
        {"datamodule__workers": 7},
        {"modulation": {"_target_": "aem_lightning.algorithms.NoModulation"}},
    ],
)
def test_a_warm_start_is_kept_when_only_the_reinforcement_changes(warm_start_folder, changes):
    assert warm_start_folder(**changes) == warm_start_folder()


def test_a_warm_start_is_made_again_where_the_same_folder_is_typed_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def key(*words):
        return build._warm_start_folder(composed(["experiment=quickstart", *words])).name

    same = {key(), key(f"paths.root_dir={tmp_path}"), key("paths.root_dir=./a/..")}
    same.add(key(f"datamodule.root={tmp_path}/data/alfworld_generated/quickstart"))
    assert len(same) == 1
    assert key("datamodule.root=elsewhere") not in same
    assert key("datamodule.root=/elsewhere") not in same


def test_a_warm_start_is_kept_wherever_code_runs_and_whatever_is_kept_of_it():
    cfg = composed(["experiment=swe_quickstart"])

    def folder(**environment):
        return build._warm_start_folder(changed(cfg, **environment))

    where = {"sandbox": "remote", "hosts": ["http://first:8700"], "records": "a", "images_gb": 3}
    nested = {f"datamodule__environment__{key}": value for key, value in where.items()}
    assert folder(**nested, name="another") == folder()
    assert folder(datamodule__environment__dialect="functions") != folder()
