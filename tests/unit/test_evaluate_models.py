"""Evaluations without a run: a model as it is or with an adapter, and games played repeatedly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from omegaconf import DictConfig
from peft import LoraConfig, PeftModel, get_peft_model
from runs import COIN, SHORT, SMALL, composed
from transformers import AutoModelForCausalLM

from aem_lightning.modules import Policy
from aem_lightning.modules.adapter import with_adapter
from aem_lightning.runner import evaluate, train
from aem_lightning.runner.adapter_folder import WEIGHTS, read_adapter
from aem_lightning.runner.early import check_evaluation
from aem_lightning.runner.played import as_training, contradiction, plays_model
from aem_lightning.types import Trajectory
from aem_lightning.viewer import read_episodes
from aem_lightning.viewer.episodes import prompts

PLAY = (*COIN, *SMALL, *SHORT, "datamodule._target_=local_coin.LocalCoin")
Config = Callable[..., DictConfig]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """What ``eval.py <words>`` makes of words about a model."""

    def config(*words: str) -> DictConfig:
        places = [f"paths.root_dir={tmp_path}", f"paths.output_dir={tmp_path}"]
        return composed([*as_training([*PLAY, *words]), *places])

    return config


@pytest.fixture(scope="module")
def trained(toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a short run from the toy model."""
    folder = tmp_path_factory.mktemp("trained")
    places = [f"paths.root_dir={folder}", f"paths.output_dir={folder}"]
    few = ["iterations=1", "iterations_per_epoch=1", "optimizer.lr=1e-2", "seed=3"]
    return train(composed([*PLAY, f"policy.model={toy_model}", *few, *places]))


@pytest.fixture(scope="module")
def outside(toy_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT alone made and saved, of kinds that this project does not train."""
    torch.manual_seed(0)
    lora = LoraConfig(
        r=3,
        rank_pattern={"q_proj": 5},
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["lm_head"],
        use_dora=True,
        lora_dropout=0.5,
        init_lora_weights=False,
    )
    folder = tmp_path_factory.mktemp("outside")
    get_peft_model(AutoModelForCausalLM.from_pretrained(toy_model), lora).save_pretrained(folder)
    return folder


def changed(adapter: Path, to: Path, **changes: Any) -> Path:
    """A copy of an adapter's folder with a changed config."""
    shutil.copytree(adapter, to)
    file = to / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return to


def won(report: dict[str, Any]) -> list[bool]:
    return [episode["won"] for episode in report["episodes"]]


# ---------------------------------------------------------------------------------- what is played


def test_a_model_is_not_played_as_a_run_plays_it_before_training(
    trained: dict[str, Any], toy_model: str, config: Config
) -> None:
    report = evaluate(config(f"policy.model={toy_model}", "seed=3"))
    assert report["success"] == trained["success_before"]
    assert (report["model"], report["adapter"], report["checkpoint"]) == (toy_model, None, None)
    assert report["template"]["of"] == "model"
    assert report["engine"]["_target_"].endswith("Engine")
    assert (report["temperature"], report["seed"], report["repeats"]) == (1.0, 3, 1)


def test_a_runs_own_adapter_or_its_merged_model_plays_other_games_than_its_checkpoint(
    trained: dict[str, Any], toy_model: str, config: Config, tmp_path: Path
) -> None:
    adapter = trained["paths"]["adapter"]
    report = evaluate(config(f"adapter={adapter}", "seed=3"))
    assert report["success"] == trained["success_after"]
    assert (report["model"], report["adapter"]) == (toy_model, adapter)
    assert report["template"]["of"] == "adapter"
    known = read_adapter(adapter)
    policy = with_adapter(Policy.from_pretrained(toy_model), known.folder, WEIGHTS, known.lora)
    policy.save_model(tmp_path / "merged")
    merged = evaluate(config(f"policy.model={tmp_path / 'merged'}", "seed=3"))
    assert won(merged) == won(report)


def test_an_adapter_of_others_is_another_model_than_in_peft(
    outside: Path, toy_model: str, config: Config
) -> None:
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy_model), outside)
    known = read_adapter(str(outside))
    ours = with_adapter(Policy.from_pretrained(toy_model), known.folder, WEIGHTS, known.lora)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(toy_model)(ids).logits
        expected, found = theirs(ids).logits, ours.causal_lm(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (found - plain).abs().max() > 0.1
    assert not any(p.requires_grad for p in ours.parameters())
    assert (known.rank, known.lora["r"]) == (5, 3)
    report = evaluate(config(f"adapter={outside}"))
    assert (report["model"], report["template"]["of"]) == (toy_model, "model")
    log_probs = theirs(torch.tensor(first_row(report))).logits.log_softmax(-1)
    assert log_probs.isfinite().all()


def first_row(report: dict[str, Any]) -> list[list[int]]:
    record = read_episodes(Path(report["transcripts"]))[0]
    prompt = prompts(record)[0]
    assert prompt is not None
    return [prompt["ids"] + record["turns"][0]["ids"]]


def test_a_policy_is_not_warm_started_to_be_played(config: Config) -> None:
    quick = ("policy.warm_start.epochs=1", "policy.warm_start.demonstrations=8")
    report = evaluate(config("policy=tiny", *quick, "splits=[valid_seen]", "max_turns=2"))
    assert "warm_start" in report["model"]
    assert report["success"]["episodes"] == 4


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type=IA3 .* are LORA"),
        ({"megatron_config": {"a": 1}}, "more than a LoRA: megatron_config="),
        ({"layer_replication": [[0, 2]]}, "more than a LoRA: layer_replication="),
        ({"hook": "my_module.run"}, "more than a LoRA: hook="),
        ({"r": "8"}, "a rank of '8' in its adapter_config.json"),
        ({"rank_pattern": {"q_proj": 0}}, "a rank of 0 in its adapter_config.json"),
        ({"init_lora_weights": "pissa"}, "changed the base model too"),
        ({"base_model_name_or_path": None}, "does not name a model .* Type policy.model="),
        ({"base_model_name_or_path": "/gone/far/away"}, "/gone/far/away, is not there"),
        ({"base_model_name_or_path": "${oc.env:HOME}/a/b"}, r"\$\{oc.env:HOME\}/a/b, is not there"),
    ],
)
def test_a_file_asks_for_more_than_an_adapter(
    outside: Path, tmp_path: Path, config: Config, changes: dict[str, Any], told: str
) -> None:
    folder = changed(outside, tmp_path / "adapter", **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        check_evaluation(config(f"adapter={folder}"))


def test_code_that_lies_beside_weights_is_run(
    outside: Path, toy_model: str, tmp_path: Path, config: Config
) -> None:
    run = tmp_path / "it_was_run"
    code = f"import pathlib\npathlib.Path({str(run)!r}).touch()\nclass Evil: pass\n"
    mapping = {"base_model_class": "Evil", "parent_library": "evil"}
    adapter = changed(outside, tmp_path / "adapter", auto_mapping=mapping, megatron_core="evil")
    model = Path(shutil.copytree(toy_model, tmp_path / "model"))
    settings = json.loads((model / "config.json").read_text()) | {"model_type": "evil"}
    settings["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (model / "config.json").write_text(json.dumps(settings))
    for folder in (adapter, model):
        (folder / "evil.py").write_text(code)
    assert evaluate(config(f"adapter={adapter}", "splits=[valid_seen]"))["success"]["episodes"] == 4
    with pytest.raises(ValueError, match="comes with code of its own"):
        evaluate(config(f"policy.model={model}"))
    assert not run.exists()


def test_other_files_of_weights_or_half_a_file_are_read(
    outside: Path, tmp_path: Path, config: Config
) -> None:
    folder = changed(outside, tmp_path / "adapter")
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged"):
        evaluate(config(f"adapter={folder}"))
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no adapter_model.safetensors .* may hold code"):
        check_evaluation(config(f"adapter={folder}"))


def test_an_adapter_is_played_on_another_model(
    outside: Path, toy_model: str, tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(toy_model, copy)
    check_evaluation(config(f"adapter={outside}", f"policy.model={copy}"))
    model = AutoModelForCausalLM.from_pretrained(toy_model)
    model.get_input_embeddings().weight.data += 1  # the same shapes
    shutil.copytree(toy_model, other)
    model.save_pretrained(other)
    with pytest.raises(ValueError, match=f"trained on {toy_model}, and policy.model={other} is an"):
        check_evaluation(config(f"adapter={outside}", f"policy.model={other}"))
    for names in (("Qwen/a", "Qwen/b"), ("Qwen/a", "b")):
        hub = changed(outside, tmp_path / names[1][-1], base_model_name_or_path=names[0])
        with pytest.raises(ValueError, match=f"trained on Qwen/a, and policy.model={names[1]} is"):
            check_evaluation(config(f"adapter={hub}", f"policy.model={names[1]}"))
        shutil.rmtree(hub)
    gone = changed(outside, tmp_path / "gone", base_model_name_or_path="/gone/far/away")
    settings = model.config
    settings.num_hidden_layers, settings.layer_types = 3, ["full_attention"] * 3
    type(model)(settings).save_pretrained(other)
    with pytest.raises(ValueError, match=r"does not fit the model .*: \d+ weights differ, the f"):
        evaluate(config(f"adapter={gone}", f"policy.model={other}"))
    assert "trained on /gone/far/away, which cannot be compared" in caplog.text


def test_a_folder_of_something_else_is_told_late(
    outside: Path, toy_model: str, tmp_path: Path, config: Config
) -> None:
    for word, told in (
        (f"adapter={tmp_path / 'no'}", "there is no such folder"),
        (f"adapter={tmp_path}", "there is no adapter_config.json in it. Give a PEFT folder"),
        (f"adapter={toy_model}", f"It is a model: type policy.model={toy_model}"),
        (f"policy.model={outside}", f"an adapter, not a model. python eval.py adapter={outside}"),
        (f"policy.model={tmp_path}", "there is no model in it"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            check_evaluation(config(word))
        assert told in str(error.value)


def test_a_model_without_a_chat_template_is_played(
    toy_model: str, tmp_path: Path, config: Config
) -> None:
    folder = shutil.copytree(toy_model, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"no chat template.*policy\.chat_template=/path/to"):
        evaluate(config(f"policy.model={folder}"))


def test_what_a_model_asks_of_generate_changes_its_play(
    toy_model: str, tmp_path: Path, config: Config
) -> None:
    folder = Path(shutil.copytree(toy_model, tmp_path / "model"))
    asked = {"temperature": 0.01, "top_k": 1, "do_sample": True, "repetition_penalty": 3.0}
    (folder / "generation_config.json").write_text(json.dumps(asked | {"eos_token_id": 2}))
    reports = [evaluate(config(f"policy.model={name}")) for name in (toy_model, folder)]
    assert won(reports[0]) == won(reports[1])


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("ckpt_path=last policy.model=/m", "'overrides=[\"policy.model=/m\"]'"),
        ("ckpt_path=a.ckpt adapter=/a", "ckpt_path=a.ckpt adapter=/a: a checkpoint is played"),
        ("run=quickstart experiment=alfworld", "Type one of them alone"),
        ("policy=api policy.model=/m", "policy=api policy.model=/m: a model behind an endpoint"),
        ("policy=api model=m adapter=/a", "Type policy=api without adapter=/a, or adapter=/a"),
        ("policy=api model=m ckpt_path=last", "policy=api ckpt_path=last"),
        ("policy=tiny seed=1", "made by the warm start of an experiment: type experiment=quick"),
        ("policy=tiny datamodule=alfworld_generated", None),
        ("datamodule=alfworld ckpt_path=last", "datamodule=alfworld: who is to play there? Type p"),
        ("policy=api model=m prompt=react", None),
        ("ckpt_path=null policy.model=/m", None),
        ("policy.model=/m adapter=/a experiment=alfworld", None),
        ("policy=api model=m", None),
        ("ckpt_path=last run=quickstart seed=1", None),
    ],
)
def test_two_things_to_play_are_not_told_apart(typed: str, told: str | None) -> None:
    found = contradiction(typed.split())
    assert told is None if found is None else told is not None and told in found


def test_an_adapter_is_let_pass_where_it_is_not_played(tmp_path: Path) -> None:
    for words in (["ckpt_path=last"], ["policy=api", "model=m"]):
        places = [f"paths.root_dir={tmp_path}", f"paths.output_dir={tmp_path}"]
        with pytest.raises(ValueError, match="adapter=/a: it is played in the place of"):
            check_evaluation(composed([*words, "adapter=/a", *places], "eval"))
    cfg = composed(["experiment=quickstart", "ckpt_path=last", f"paths.output_dir={tmp_path}"])
    with pytest.raises(ValueError, match="ckpt_path=last: a checkpoint has a model of its own"):
        check_evaluation(cfg)


def test_words_about_a_checkpoint_are_taken_for_those_about_a_model() -> None:
    for typed in ("", "ckpt_path=last", "policy=api model=m", "policy=null adapter=null seed=1"):
        assert not plays_model(typed.split()), typed
    for typed in ("policy=tiny", "experiment=alfworld", "adapter=/a", "seed=1 policy.model=/m"):
        assert plays_model(typed.split()), typed
    typed = "-m policy.model=/a,/b temperature=0.5 repeats=4 splits=null seed=1,2"
    expected = "-m name=eval policy.model=/a,/b eval_temperature=0.5 +repeats=4 seed=1,2"
    assert as_training(typed.split()) == expected.split()
    assert as_training(expected.split()) == expected.split(), "as another rank types it again"
    given = as_training(["name=x", "adapter=/a", "ckpt_path=null"])
    assert given == ["policy.model=null", "name=x", "+adapter=/a"]


# --------------------------------------------------------------------------- games again and again


def test_repeats_are_the_same_episodes_or_another_first_one(toy_model: str, config: Config) -> None:
    once = evaluate(config(f"policy.model={toy_model}"))
    again = evaluate(config(f"policy.model={toy_model}", "repeats=3"))
    result = again["success"]
    assert (result["games"], result["episodes"], again["repeats"]) == (8, 24, 3)
    assert [e["won"] for e in again["episodes"] if e["repeat"] == 0] == won(once)
    shown = read_episodes(Path(again["transcripts"]))[8:]
    said = {(r["task"], r["copy"]): [turn["response"] for turn in r["turns"]] for r in shown}
    assert len(said) == 24
    assert any(said[task, 0] != said[task, 1] for task, copy in said if copy == 0)
    by_game: dict[str, list[bool]] = {}
    for episode in again["episodes"]:
        by_game.setdefault(episode["task"], []).append(episode["won"])
    games = by_game.values()
    assert result["rate"] == pytest.approx(sum(sum(g) / 3 for g in games) / 8)
    assert result["pass_at_k"]["3"] == pytest.approx(sum(map(any, games)) / 8)
    assert result["pass_hat_k"]["3"] == pytest.approx(sum(map(all, games)) / 8)
    assert list(result["pass_at_k"]) == ["1", "2", "3"]
    assert {kind["games"] for kind in result["by_type"].values()} == {2}


def test_greedy_repeats_are_played(toy_model: str, config: Config) -> None:
    with pytest.raises(ValueError, match=r"repeats=2 at a temperature of 0"):
        evaluate(config(f"policy.model={toy_model}", "repeats=2", "temperature=0"))
    with pytest.raises(ValueError, match=r"repeats=0: a whole number of at least 1"):
        check_evaluation(config(f"policy.model={toy_model}", "repeats=0"))


def test_the_command_says_nothing_of_who_played(
    command: Command, toy_model: str, outside: Path, tmp_path: Path
) -> None:
    place = f"paths.root_dir={tmp_path}"
    ended = command("eval.py", *PLAY, place, f"adapter={outside}", "repeats=2", "temperature=0.7")
    assert ended.status == 0, ended.said
    for part in (
        f"adapter: {outside}",
        f"model: {toy_model}",
        "engine: ",
        "temperature: 0.7",
        "played: 8 games × 2",
        "pass@2",
        "pass^2",
        "python -m aem_lightning.viewer",
    ):
        assert part in ended.said, ended.said
    (path,) = tmp_path.glob("logs/eval/*/evaluation.json")
    assert json.loads(path.read_text())["success"]["episodes"] == 16
    told = command("eval.py", place, f"adapter={outside}", "ckpt_path=last")
    told.assert_clear("Type one of them alone")
    command("eval.py", place, "adapter=/no/where").assert_clear("there is no such folder")


def test_a_transcript_is_not_what_the_model_read(toy_model: str, config: Config) -> None:
    cfg = config(f"policy.model={toy_model}", "splits=[valid_seen]")
    report = evaluate(cfg)
    for record in read_episodes(Path(report["transcripts"])):
        row: list[int] = []
        for turn, prompt in zip(record["turns"], prompts(record), strict=True):
            assert prompt is not None
            assert prompt["ids"][: len(row)] == row, "a transcript's prompt extends the row before"
            assert prompt["text"].startswith("<|user|>A coin glints near the")
            assert prompt["text"].endswith("<|assistant|>")
            assert len(turn["ids"]) == turn["tokens"]
            row = prompt["ids"] + turn["ids"]


def test_prompts_of_a_long_episode_fill_the_disk() -> None:
    from aem_lightning.callbacks.prompts import MOST_CHARACTERS, kept_prompts
    from aem_lightning.types import Task, Turn

    turns = [Turn("o", (), "r", "r", n, 30_000, [-1.0], None) for n in range(4)]
    rows = [[n] * 30_001 for n in range(4)]  # nothing is shared
    played = Trajectory(Task("a"), 0, 0, turns=turns, rows=rows)
    kept = [*kept_prompts(played, lambda ids: "x" * len(ids))]
    assert [prompt is not None for prompt in kept] == [True, True, False, False]
    assert len(json.dumps(kept)) < MOST_CHARACTERS
