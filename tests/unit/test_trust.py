"""A checkpoint is data: what its config asks for is made where a person has typed it alone."""

import copy

import pytest
from omegaconf import OmegaConf
from runs import composed

from aem_lightning.runner import trust
from aem_lightning.runner.build import plain
from aem_lightning.runner.checks import ConfigError
from aem_lightning.runner.evaluation import checked_config


@pytest.fixture(scope="module")
def stored():
    """The config that a checkpoint of the quickstart holds."""
    return plain(composed(["experiment=quickstart", "paths.output_dir=."]))


@pytest.fixture(autouse=True)
def nothing_typed(monkeypatch):
    monkeypatch.setattr(trust, "_typed", set())


def restored(stored, *overrides, **changes):
    """The checked config of a checkpoint in which somebody changed ``changes``."""
    cfg = OmegaConf.create(copy.deepcopy(stored))
    for key, value in changes.items():
        node = value if isinstance(value, str) else OmegaConf.create(value)
        OmegaConf.update(cfg, key.replace("__", "."), node, merge=False, force_add=True)
    evaluation = composed(["paths.output_dir=."], "eval")
    evaluation.overrides = list(overrides)
    return checked_config(evaluation, OmegaConf.to_container(cfg))


def test_a_checkpoint_of_ones_own_run_is_refused(stored):
    assert restored(stored, "datamodule.workers=5").datamodule.workers == 5


COPY = {"_target_": "shutil.copy", "src": "a", "dst": "b"}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rewards": COPY}, "rewards._target_=shutil.copy"),
        ({"loss__covariance": COPY}, "loss.covariance._target_=shutil.copy"),
        ({"datamodule__task_types": [{"a": COPY}]}, "datamodule.task_types.0.a._target_="),
        ({"prompt__role": {"_target_": "os.system", "_args_": ["x"]}}, "prompt.role._args_.0=x"),
        ({"rewards___target_": "aem_lightning.rollout.vllm_engine.shutil.copy"}, "engine.shutil"),
        ({"rewards___target_": "aem_lightning.rollout.make_groups"}, "rollout.make_groups"),
        ({"rewards___target_": "aem_lightning.envs.EnvPool"}, "envs.EnvPool"),
        ({"optimizer___target_": "torch.optim.swa_utils.torch.load"}, "torch.load"),
        ({"trainer___target_": "subprocess.run"}, "trainer._target_=subprocess.run"),
        ({"datamodule__environment": {"allow_unsafe": True}}, "environment.allow_unsafe=True"),
        (
            {"datamodule__environment": {"hosts": ["http://a:1", "http://b"]}},
            "[http://a:1,http://b]",
        ),
    ],
)
def test_what_a_file_asks_for_is_made(stored, changes, key, monkeypatch):
    monkeypatch.setattr("shutil.copy", lambda *given: pytest.fail("the file's function was run"))
    with pytest.raises(ConfigError, match="no part of aem_lightning") as error:
        restored(stored, **changes)
    assert key in str(error.value)
    assert f"{key.rpartition('.')[2]}" in str(error.value).rpartition("'overrides=[\"")[2]


def test_what_is_typed_again_or_trained_here_is_refused(stored):
    own = {"rewards___target_": "collections.OrderedDict"}
    typed = "rewards._target_=collections.OrderedDict"
    assert restored(stored, typed, **own).rewards._target_ == "collections.OrderedDict"
    with pytest.raises(ConfigError, match="OrderedDict"):  # another value of the same key
        restored(stored, "rewards={success: 1}", **own)
    trust.remember(composed(["paths.output_dir=.", typed]))
    assert trust.typed_again(composed(["paths.output_dir=.", typed])) == [f'overrides=["{typed}"]']
    assert restored(stored, **own)


def test_a_text_of_a_checkpoint_is_looked_up_in_the_environment(stored, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hush")
    for text in ("${oc.env:A_SECRET}", r"\${x} and \\${oc.env:A_SECRET}", "{a: ${seed}}"):
        assert restored(stored, prompt__role=text).prompt.role == text
    with pytest.raises(ConfigError, match=r"rewards\._target_=\\\$\{oc\.env"):
        restored(stored, rewards___target_="${oc.env:A_SECRET}")
