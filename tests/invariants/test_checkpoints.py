"""Checkpoints: what they hold, and that training goes on from them as if nothing had happened."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.forks import command as in_fork
from runs import fit, toy_config, toy_overrides
from safetensors.torch import load_file, save_file

from aem_lightning.runner import train
from aem_lightning.runner.signals import Stopped, stoppable


def loaded(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def test_a_checkpoint_holds_more_than_what_is_trained(toy_model: str, tmp_path: Path) -> None:
    module = fit(toy_config(tmp_path, toy_model))
    trained = {f"policy.{name}": p.shape for name, p in module.policy.trainable().items()}
    assert trained
    assert all("lora_" in name for name in trained)
    found = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    assert [path.name for path in found] == ["best.ckpt", "last.ckpt"]
    for path in found:
        checkpoint = loaded(path)
        assert {name: v.shape for name, v in checkpoint["state_dict"].items()} == trained
        assert len(checkpoint["optimizer_states"][0]["state"]) == len(trained)
        assert checkpoint["aem_lightning"]["config"]["group_size"] == 4
    assert loaded(found[1])["aem_lightning"]["iteration"] == 4


def test_other_adapters_are_loaded_silently(toy_model: str, tmp_path: Path) -> None:
    fit(toy_config(tmp_path / "a", toy_model, "iterations=1", "iterations_per_epoch=1"))
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"do not fit this policy .* policy\.lora settings"):
        fit(toy_config(tmp_path / "b", toy_model, "policy.lora.r=2"), ckpt_path=last)


def test_adapters_are_loaded_onto_other_weights(toy_model: str, tmp_path: Path) -> None:
    fit(toy_config(tmp_path / "a", toy_model, "iterations=1", "iterations_per_epoch=1"))
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    other = tmp_path / "other"
    shutil.copytree(toy_model, other)
    weights = load_file(other / "model.safetensors")
    name = max(weights, key=lambda name: weights[name].numel())
    save_file(weights | {name: weights[name] + 0.01}, other / "model.safetensors", {"format": "pt"})
    typed = re.escape(f"policy.model={toy_model}")
    with pytest.raises(ValueError, match=rf"trained on the weights of .* made anew.* {typed}"):
        fit(toy_config(tmp_path / "b", str(other)), ckpt_path=last)
    half = fit(toy_config(tmp_path / "c", toy_model, "policy.dtype=bfloat16"), ckpt_path=last)
    assert half.iteration == 4  # another precision of the same weights


@pytest.mark.parametrize(
    ("stage", "whole", "lag"), [("rollout", 2, 0), ("update", 3, 0), ("update", 3, 1)]
)
def test_a_signal_loses_a_whole_iteration_or_keeps_half_of_one(
    toy_model: str, tmp_path: Path, stage: str, whole: int, lag: int
) -> None:
    """The rollout under way is dropped, also one ahead; an update under way is finished."""
    stop = ("+callbacks.stop._target_=toy.Stop", f"+callbacks.stop.stage={stage}")
    same = ("scheduler=constant", "evaluate=false", f"rollout.lag={lag}")
    run = (*same, "iterations_per_epoch=4", *stop, "+callbacks.stop.iteration=2")
    with pytest.raises(Stopped) as stopped, stoppable():
        train(toy_config(tmp_path / "stopped", toy_model, *run))
    last = tmp_path / "stopped" / "checkpoints" / "last.ckpt"
    assert f"stopped after iteration {whole}. To go on, type: " in stopped.value.told
    assert f"ckpt_path={last}" in stopped.value.told
    assert (tmp_path / "stopped" / "adapter" / "adapter_model.safetensors").is_file()

    short = (f"iterations={whole}", "iterations_per_epoch=1")
    fit(toy_config(tmp_path / "whole", toy_model, *same, *short))
    found, expected = loaded(last), loaded(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
    assert found["aem_lightning"]["iteration"] == whole


def test_a_killed_and_resumed_run_differs_from_an_uninterrupted_one(
    toy_model: str, tmp_path: Path
) -> None:
    run = (*toy_overrides(tmp_path, toy_model), "iterations=6", "update_epochs=2")
    kill = (
        "+callbacks.kill._target_=toy.Kill",
        "+callbacks.kill.epoch=1",
        "+callbacks.kill.batch=1",
    )
    ended = in_fork("train.py", *run, *kill)
    assert ended.status == -signal.SIGKILL, ended.said
    (killed,) = tmp_path.glob("logs/*/*/checkpoints/last.ckpt")
    assert loaded(killed)["aem_lightning"]["iteration"] == 2
    ended = in_fork("train.py", *run, "ckpt_path=last")
    assert ended.status == 0, ended.said
    resumed = max(tmp_path.glob("logs/*/*/checkpoints/last.ckpt"), key=os.path.getmtime)
    assert resumed != killed

    whole = train(toy_config(tmp_path / "whole", toy_model, *run[-2:]))
    expected, found = loaded(Path(whole["paths"]["checkpoint"])), loaded(resumed)
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
    assert found["aem_lightning"]["iteration"] == expected["aem_lightning"]["iteration"] == 6
    assert found["epoch"] == expected["epoch"]
    assert found["global_step"] == expected["global_step"]
    monitor = next(name for name in expected["callbacks"] if "AEMMonitor" in name)
    assert found["callbacks"][monitor] == expected["callbacks"][monitor]
