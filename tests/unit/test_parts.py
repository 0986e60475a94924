"""Parts named by their class: what does not fit is told before anything is made."""

import pytest
from runs import composed

from aem_lightning.runner.build import check_parts
from aem_lightning.runner.checks import ConfigError, check_config

OWN = """
from dataclasses import dataclass
import torch

@dataclass
class Estimator:
    weight: float
    min_group_size: int = 2
    def __call__(self, batch):
        return self.weight * batch.returns[batch.trajectory]

class Modulation:
    def keeps_zeros(self):
        return True
    def __call__(self, batch):
        pass

class Loss:
    aggregation, keeps_zeros, needs_reference = "tokens", True, 0

class Callback:
    pass

def loss(columns):
    return columns
"""


@pytest.fixture(autouse=True)
def own_parts(tmp_path, monkeypatch):
    (tmp_path / "parts_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def config(*overrides):
    """The quickstart's; ``own:`` stands for the module of a person."""
    written = [text.replace("own:", "parts_of_a_test.") for text in overrides]
    return composed(["experiment=quickstart", "paths.output_dir=.", *written])


def custom(group, name):
    return f"{group}=custom", f"{group}._target_=own:{name}"


def test_a_custom_part_without_a_class_says_nothing_of_what_to_type():
    own = {"advantage": "MyEstimator", "modulation": "MyModulation", "loss": "MyLoss"}
    with pytest.raises(ConfigError) as error:
        check_config(config(*(f"{group}=custom" for group in own)))
    for group, name in own.items():
        assert f"type {group}._target_=my_package.{name}, the class" in str(error.value)


def test_a_class_of_ones_own_is_refused_or_gets_no_arguments():
    cfg = config(*custom("advantage", "Estimator"), "+advantage.weight=3")
    check_config(cfg)
    check_parts(cfg)
    cfg.group_size = 1
    with pytest.raises(ValueError, match="group_size=1 is too small for Estimator"):
        check_parts(cfg)


# Overrides with more than one mistake each, and what is said of every one of them.
MISTAKES = (
    (
        *custom("advantage", "Estimator"),
        "+advantage.wait=2",
        *custom("modulation", "Modulation"),
        *custom("loss", "Los"),
        "+callbacks.mine._target_=own:Callback",
        "callbacks.transcripts=true",
        "+callbacks.aem.every=2",
        "+logger.tensorboard.x=1",  # no mistake: it takes any argument
    ),
    (
        "advantage.overlong={_target_: aem_lightning.algorithms.Overlong, max_length: 6, x: 1}",
        "+modulation.x=1",
        *custom("loss", "Loss"),
    ),
    (
        *("advantage=custom", "advantage._target_=no_such.Thing"),
        "modulation.min_range=wide",
        *custom("loss", "loss"),
    ),
)
SAID = (
    (
        "advantage.wait=2: there is no such argument. Allowed: advantage.weight, advantage.min_",
        "advantage.weight is not given: type +advantage.weight=...",
        "it needs keeps_zeros, of type bool, and has <bound method",
        "'Los' is importable from module 'parts_of_a_test'? Type the class of a module that Python",
        "callbacks.aem.every=2: there is no such argument. Allowed: none",
        "callbacks.transcripts=True: which class? type callbacks.transcripts._target_=",
        "callbacks.mine._target_=parts_of_a_test.Callback: not a lightning.pytorch.callbacks.",
    ),
    (
        "advantage.overlong.x=1: there is no such argument. Allowed: advantage.overlong.max_length",
        "modulation.x=1: there is no such argument. Allowed: modulation.sharpness",
        "loss._target_=parts_of_a_test.Loss: it has no __call__. See aem_lightning.algorithms",
        "it needs aggregation, one of token, sequence, constant, and has 'tokens'. aggregation: ``",
        "it needs needs_reference, of type bool, and has 0. needs_reference: Whether ``ref_logp",
    ),
    (
        "No module named 'no_such'",
        "modulation.min_range='wide': a number, e.g. modulation.min_range=0.1",
        "loss.columns is not given: type +loss.columns=...",
    ),
)


@pytest.mark.parametrize(("overrides", "said"), zip(MISTAKES, SAID, strict=True))
def test_a_part_that_does_not_fit_is_found_late_or_not_explained(overrides, said):
    with pytest.raises(ConfigError) as error:
        check_parts(config(*overrides))
    problems = str(error.value).split("\n  - ")[1:]
    assert len(problems) == len(said), problems
    for problem, words in zip(problems, said, strict=True):
        assert words in problem
