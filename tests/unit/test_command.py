"""What a command answers before torch is imported: words, values, files, help."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import train
from omegaconf import OmegaConf
from runs import COMMAND_ENVIRONMENT, CONFIGS, ROOT, composed

from aem_lightning import runner
from aem_lightning.runner.command import Command
from aem_lightning.runner.early import check_training
from aem_lightning.runner.help_page import read_comments
from aem_lightning.runner.overrides import given_twice
from aem_lightning.runner.summary import optimized

TRAIN = Command(CONFIGS, "train", "python train.py", "", check_training)


def complaint(*arguments):
    with pytest.raises(SystemExit) as ended:
        TRAIN.answer(list(arguments))
    assert isinstance(ended.value.code, str)
    return ended.value.code


def test_good_overrides_pass():
    TRAIN.answer(["experiment=quickstart", "optimizer.lr=1e-3"])


def test_hydras_own_flags_are_left_to_hydra():
    TRAIN.answer(["--cfg", "job", "iterations=0"])
    TRAIN.answer(["group_size=4,8", "seed=range(0,3)", "--multirun"])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("group_sise=4", "group_size?"),
        ("optimizer.lrr=1", "optimizer.lr"),
        ("loss.clip_hihg=0.3", "loss.clip_high or"),
        ("los.kl_coef=0", "loss.kl_coef"),
        ("lr=1", "optimizer.lr"),
        ("modulatoin=aem", "modulation"),
        ("experimnt=quickstart", "experiment?"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_ones(given, meant):
    message = complaint("experiment=quickstart", given)
    assert given.partition("=")[0] in message
    assert "Did you mean" in message
    assert meant in message.partition("Did you mean")[2]


def test_a_files_own_key_is_unknown_once_what_reads_it_is_typed(tmp_path):
    (tmp_path / "experiment").mkdir()
    mine = tmp_path / "experiment" / "mine.yaml"
    typed = (f"hydra.searchpath=['file://{tmp_path}']", "experiment=mine")
    mine.write_text("# @package _global_\nhelper: key_and\nname: ${helper}_door\n")
    TRAIN.answer([*typed, "datamodule.workers=2"])
    TRAIN.answer([*typed, "name=other"])
    mine.write_text("# @package _global_\ngroupsize: 4\n")
    assert "groupsize: a file of this config sets it" in complaint(*typed)


def test_an_unknown_option_is_answered_with_those_that_there_are():
    message = complaint("experiment=quickstrat")
    assert "quickstrat" in message
    assert "quickstart" in message
    assert "alfworld_grpo" in message


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("group_size=[1",), "Given: group_size=[1"),
        (("modulation=0.5",), "modulation=0.5: there is no such option. Allowed: aem, "),
        (("datamodule=elsewhere", "loss=null"), "loss=null: there is no such option. Allowed: "),
        (
            ("loss=adaptive_entropy", "loss.adaptive_entropy=[]"),
            "loss.adaptive_entropy.target, loss",
        ),
        (("name=''",), "name='': runs lie in"),
        (("name=a/../../b",), "name='a/../../b': runs lie in"),
        (("policy=/a/b",), "policy=/a/b: there is no such option. Allowed: "),
        (("experiment", "=", "quickstart"), "Type experiment=quickstart"),
        (("experiment=", "quickstart"), "Type experiment=quickstart"),
        (("experiment", "=quickstart", "seed=1"), "Type experiment=quickstart"),
        (("quickstart",), "Did you mean experiment=quickstart?"),
        (("seed",), "seed: an override is key=value. Type seed=..."),
        (("--hlep",), "--hlep: there is no such flag. Did you mean --help?"),
        (("--seed=1",), "options take no dashes. Type seed=1"),
        (("seed=1", "--cfg", "job", "iterations=1"), "iterations=1: overrides stand side by side"),
        (("iteratons=1", "--cfg", "job"), "iteratons=1: the config has no such key. Did you mean"),
        (("seed=1,2", "iteratons=1,2", "-m"), "iteratons=1: the config has no such key."),
        (("memory=window,windw", "-m"), "memory='windw': allowed are memory=window"),
        (("loss=clipped,clipd", "--multirun"), "loss=clipd: there is no such option."),
        (("policy=api",), "can be played, not trained. Type python eval.py policy=api"),
    ],
)
def test_a_broken_override_is_told_without_what_to_type(given, told):
    assert told in complaint(*given)


SEARCH = ["experiment=quickstart", "hparams_search=quickstart_optuna"]


def test_a_search_without_optuna_says_what_to_install():
    if find_spec("optuna"):
        pytest.skip("optuna is installed")
    assert "pip install 'aem-lightning[sweep]'" in complaint(*SEARCH)


def test_a_search_hands_each_run_other_settings_and_keeps_the_best(tmp_path, monkeypatch):
    """With Optuna and Hydra's plugin as they are; a training is a function of its learning rate."""
    pytest.importorskip("optuna")
    played = []

    def trained(cfg):
        played.append(cfg.optimizer.lr)
        return {"success_after": {"rate": cfg.optimizer.lr}}

    monkeypatch.setattr(runner, "train", trained)
    sizes = ["hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.n_startup_trials=3"]
    monkeypatch.setattr(sys, "argv", ["train.py", *SEARCH, *sizes, f"paths.root_dir={tmp_path}"])
    train.train()
    (found,) = tmp_path.rglob("optimization_results.yaml")
    results = OmegaConf.load(found)
    assert len(set(played)) == 3
    assert results.best_value == results.best_params["optimizer.lr"] == max(played)
    assert all(3e-4 <= rate <= 3e-3 for rate in played)


def test_what_a_search_compares_is_of_the_success_after_training():
    summary = {"success_after": {"rate": 0.5, "low": 0.4}, "success_before": None}
    assert optimized({"optimized_metric": "low"}, summary) == 0.4
    assert optimized({}, summary) is None
    assert math.isnan(optimized({"optimized_metric": "rate"}, {"success_after": None}))
    cfg = composed(["experiment=quickstart", "optimized_metric=rate", "evaluate=false"])
    with pytest.raises(ValueError, match="type evaluate=true"):
        check_training(cfg)


def test_a_value_that_is_given_twice_is_not_told():
    given = ["seed=1", "+seed=2", "memory=window", "memory=window", "max_turns=3"]
    assert given_twice(given) == {"seed": ["1", "2"]}


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("/no/such/folder", True),
        ("'~/no_such_folder'", True),
        ("data/warm_start/none", True),
        ("Qwen/Qwen2.5-1.5B-Instruct", False),
        ("gpt2", False),
    ],
)
def test_a_name_on_the_hub_is_taken_for_a_missing_folder(model, told):
    cfg = composed(["experiment=quickstart", f"policy.model={model}"])
    if told:
        with pytest.raises(FileNotFoundError, match=r"^policy\.model=.*: there is no such"):
            check_training(cfg)
    else:
        check_training(cfg)


def test_missing_files_are_told_one_at_a_time(tmp_path):
    cfg = composed(
        [
            "datamodule=webshop",
            f"datamodule.root={tmp_path}",
            "policy.model=./none",
            "policy.chat_template=/none",
        ]
    )
    with pytest.raises(FileNotFoundError) as error:
        check_training(cfg)
    message = str(error.value)
    assert all(name in message for name in ("items_shuffle.json", "./none", "template=/none"))
    with pytest.raises(FileNotFoundError, match=r"No SWE instances: .*/none\.json is not a file"):
        check_training(
            composed(["datamodule=swe_json", f"datamodule.splits.train={tmp_path}/none.json"])
        )


def test_the_model_of_a_warm_start_is_missed_late_or_without_how_to_make_it(tmp_path):
    cfg = composed(["experiment=alfworld_smollm2", f"paths.root_dir={tmp_path}"])
    with pytest.raises(FileNotFoundError, match=r"policy\.warm_start\.base=.*`make model`"):
        check_training(cfg)


def test_help_leaves_out_a_comment_of_the_config(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as ended:
        TRAIN.answer(["experiment=quickstart", "--help"])
    assert ended.value.code == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "scheduler: constant, linear* # of the learning rate, a step an iteration" in lines
    assert "seed 0 key of every random draw of ours" in lines
    assert (
        "memory transcript window: the last turns in one prompt; transcript: everything so far"
        in lines
    )
    assert "How an episode is played." in lines
    keys = [str(key) for key in OmegaConf.load(CONFIGS / "train.yaml") if key != "defaults"]
    told = [line.split(maxsplit=1)[0].rstrip(":") for line in lines if line]
    assert [key for key in keys if key not in told] == []


def test_a_comment_goes_to_the_wrong_key(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "# Header,\n# of two lines.\ndefaults:\n  - base\n  - /policy: null # whose\n\n"
        "a: 1 # beside,\n# goes on\n# Above b.\nb:\n  c: 2 # inside\nd: 'x#y'\n"
        "e: 3 # beside\n\n# above f\nf: 4\n",
        encoding="utf-8",
    )
    found = read_comments(file)
    assert found.header == "Header, of two lines."
    assert found.beside == {"policy": "whose", "a": "beside, goes on", "e": "beside"}
    assert found.above == {"b": "Above b.", "f": "above f"}
    assert found.parents == ["base"]


# ------------------------------------------------------------------------------------------- torch

HEAVY = {"bitsandbytes", "datasets", "lightning", "matplotlib", "numpy", "peft", "torch"} | {
    "torchmetrics",
    "transformers",
}
# Each command as a person types it, in one process, since none of them may load what is heavy.
RUN_ALL = f"""
import contextlib, io, json, runpy, sys
from hydra.core.global_hydra import GlobalHydra
for words in json.load(sys.stdin):
    status, said = 0, io.StringIO()
    sys.argv = words[words[0] == "-m":]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    GlobalHydra.instance().clear()
    if isinstance(status, str):
        said.write(status)
        status = 1
    heavy = sorted({HEAVY!r} & sys.modules.keys())
    print(json.dumps([status or 0, " ".join(said.getvalue().split()), heavy]))
"""


ANALYSIS = "-m aem_lightning.analysis"
ANSWERS = [
    ("train.py --help", 0, "Train an LLM agent"),
    ("train.py --cfg job experiment=quickstart", 0, "group_size: 8"),
    ("train.py --cfg hydra", 0, "hydra:"),
    ("train.py --cfg job --resolve paths.output_dir=x", 0, "output_dir: x"),
    ("train.py --info searchpath", 0, "Config search path"),
    ("train.py group_sise=4", 1, "Did you mean group_size?"),
    ("train.py modulation=none_such", 1, "Allowed: aem, "),
    ("train.py iterations=0 memory=x", 1, "memory='x': allowed are"),
    ("train.py --multirun iterations=0,1 paths.root_dir={folder}", 1, "iterations=0: a whole"),
    ("train.py ckpt_path=/nowhere", 1, "there is no such file"),
    ("train.py ckpt_path=last name=none_such", 1, "has a checkpoint yet"),
    ("train.py policy.model=/none/such", 1, "there is no such folder"),
    ("train.py policy.chat_template=/none/such.jinja", 1, "there is no such file"),
    ("train.py datamodule=alfworld datamodule.root=/none", 1, "alfworld-download"),
    ("train.py datamodule=webshop datamodule.root=/none", 1, "webshop_generated"),
    ("eval.py --help", 0, "every evaluation game once"),
    ("eval.py policy=api --help", 0, "the endpoint's name of it"),
    ("eval.py ckpt_path=/nowhere", 1, "there is no such file"),
    (ANALYSIS, 0, "Analysis A: is alpha"),
    (f"{ANALYSIS} proxy --help", 0, "prompts met in fresh rollouts"),
    (f"{ANALYSIS} compare --cfg job", 0, "arm_overrides:"),
    (f"{ANALYSIS} proxy", 1, "ckpt is not given"),
    (f"{ANALYSIS} proxy ckpt=/nowhere states=1", 1, "at least 2"),
    (f"{ANALYSIS} masks iteratoins=3", 1, "Did you mean iterations?"),
    (f"{ANALYSIS} ablations arms=[none_such]", 1, "'none_such' is unknown"),
    (f"{ANALYSIS} cost run=/nowhere", 1, "there is no step_time.json"),
    ("-m aem_lightning.viewer --help", 0, "Show the episodes"),
]


def ended(*words: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=COMMAND_ENVIRONMENT | {"COLUMNS": "300"},
        input=given,
        capture_output=True,
        text=True,
        timeout=170,
        check=True,
    )


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    typed = [words.format(folder=folder).split() for words, _, _ in ANSWERS]
    lines = ended("-c", RUN_ALL, given=json.dumps(typed)).stdout.splitlines()
    return dict(zip([words for words, _, _ in ANSWERS], map(json.loads, lines), strict=True))


@pytest.mark.parametrize(("words", "status", "told"), ANSWERS)
def test_torch_is_imported_before_an_answer(words, status, told, answers):
    found, said, heavy = answers[words]
    assert told in said
    assert found == status, said
    assert heavy == []


def test_a_misspelt_key_costs_much_more_than_importing_hydra():
    def seconds(*words: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], cwd=ROOT, env=COMMAND_ENVIRONMENT, check=False)
        return time.perf_counter() - start

    # In turn, so that a busy machine slows both; three times is usual, torch alone takes ten.
    pairs = [(seconds("train.py", "group_sise=4"), seconds("-c", "import hydra")) for _ in range(3)]
    assert statistics.median(mistake / hydra for mistake, hydra in pairs) < 5
