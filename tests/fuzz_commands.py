"""Random command lines: each ends in a run, or in an error that names one of its keys.

``python tests/fuzz_commands.py --lines 2000 --seed 0``. What is checked is what a command checks
before games, models and warm starts are made, by the same functions, all in one process.
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from aem_lightning.analysis.__main__ import ANALYSES  # noqa: E402
from aem_lightning.runner.api import checked_endpoint  # noqa: E402
from aem_lightning.runner.build import check_parts, plain  # noqa: E402
from aem_lightning.runner.checks import EvalOptions, refuse, wrong_options  # noqa: E402
from aem_lightning.runner.cli import MENDABLE  # noqa: E402
from aem_lightning.runner.command import Command  # noqa: E402
from aem_lightning.runner.early import check_evaluation, check_training  # noqa: E402
from aem_lightning.runner.evaluation import checked_config  # noqa: E402
from aem_lightning.runner.overrides import options_of  # noqa: E402
from aem_lightning.runner.parts import made  # noqa: E402

CONFIGS = ROOT / "configs"
VALUES = (
    *("null", "nan", "inf", "-inf", "-1", "0", "1", "2", "1.5", "-0.5", "1e30"),
    *("99999999999999999999", "1000000000", "true", "false", "a", "''", "'a b'"),
    *("'/no/such/place'", "'${nope}'", "'???'", "'{'", "x" * 5000),
    *("[]", "[1,2]", "[a]", "[null]", "[[]]", "{}", "{a: 1}", "{_target_: a.b}", "{_target_: 1}"),
)
# What a line begins with, so that every group's keys are met.
TRAIN = (
    "",
    "algorithm=dapo modulation=empg_aem loss=truncated_is",
    "algorithm=gigpo loss=adaptive_entropy scheduler=linear",
    "algorithm=ppo loss=kl_cov logger=[tensorboard,csv] callbacks=curriculum",
    "algorithm=rloo loss=clip_cov modulation=empg engine=vllm",
    "datamodule=webshop_generated prompt=plain advantage=reinforcepp",
    "datamodule=swe_embedded prompt=swe_functions",
    "datamodule=gymnasium datamodule.env_id=x:y prompt=react stage=warm_start",
)
GROUPS = ("scheduler", "loss", "trainer", "policy", "callbacks", "prompt", "engine", "paths")
OTHERS = {
    "eval": "policy=api base_url=http://127.0.0.1:9/v1 model=m",
    "stored": "",
    "analysis/proxy": "ckpt={folder}/last.ckpt",
    "analysis/masks": "",
    "analysis/compare": "",
    "analysis/cost": "run={folder}",
}


@dataclass
class Fuzz:
    """A source of command lines, and what becomes of them."""

    folder: Path
    random: random.Random
    made_of: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)
    keys: dict[tuple[str, ...], list[str]] = field(default_factory=dict)

    def line(self) -> tuple[str, list[str], list[str]]:
        """A command, what it begins with, and overrides that nobody should type.

        ``stored`` is an evaluation that changes the config of a checkpoint.
        """
        train = self.random.random() < 0.6
        name = "train" if train else self.random.choice(list(OTHERS))
        base = (self.random.choice(TRAIN) if train else OTHERS[name]).split()
        base = [word.format(folder=self.folder) for word in base]
        place = ("train" if name == "stored" else name, *base)
        if place not in self.keys:
            found = _keys(self.composed(place[0], base))
            left_out = ("hydra", "paths.output_dir")
            self.keys[place] = [key for key in found if not key.startswith(left_out)]
        keys = self.keys[place]
        count = self.random.choice((1, 1, 2, 3))
        return name, base, [self.override(name, keys) for _ in range(count)]

    def override(self, name: str, keys: Sequence[str]) -> str:
        key, kind = self.random.choice(keys), self.random.random()
        value = self.random.choice(VALUES)
        if name == "stored" or kind < 0.75:
            return f"{key}={value}"
        if kind < 0.85:
            return f"~{key}"
        if kind < 0.93:
            new = self.random.choice(("foo", "_args_", "_partial_"))
            return f"+{key.rpartition('.')[0] or key}.{new}={value}"
        group = self.random.choice(GROUPS)
        return f"{group}={self.random.choice([*options_of(group), 'null', 'none_such', '[]'])}"

    def composed(self, name: str, given: Sequence[str]) -> DictConfig:
        """The config of a command; what was composed before is kept, and values join a copy."""
        groups = [word for word in given if _is_group(word)]
        place = (name, *groups)
        if place not in self.made_of:
            places = [f"paths.root_dir={self.folder}", f"paths.output_dir={self.folder}"]
            self.made_of[place] = self.command(name)._compose([*places, *groups])
        cfg = copy.deepcopy(self.made_of[place])
        rest = [o for o in given if o not in groups]
        try:
            parsed = OverridesParser.create().parse_overrides(rest)
            ConfigLoaderImpl._apply_overrides_to_config(parsed, cfg)
        except Exception:  # told as the command tells it
            return self.command(name)._compose(list(given))
        return cfg

    def command(self, name: str) -> Command:
        checks = {"train": check_training, "eval": check_evaluation}
        analysis = ANALYSES.get(name.removeprefix("analysis/"))
        check = checks[name] if analysis is None else analysis.check
        return Command(CONFIGS, name, f"python {name}.py", "", check)

    def verdict(self, name: str, given: Sequence[str]) -> str:
        """What the command says: nothing where it would run.

        Raises:
            Exception: What a person would see as a traceback.
        """
        try:
            if name == "stored":
                stored = plain(self.without_hydra(self.composed("train", [])))
                cfg = self.without_hydra(self.composed("eval", []))
                cfg.overrides = list(given)
                refuse(wrong_options(cfg, EvalOptions))  # what check_evaluation begins with
                made("datamodule", checked_config(cfg, stored).datamodule)
                return ""
            cfg = self.composed(name, given)
            self.command(name)._check_early(cfg)
            cfg = self.without_hydra(cfg)
            if name == "train":
                check_training(cfg)
                check_parts(cfg)
                made("datamodule", cfg.datamodule)
            elif name == "eval":
                check_evaluation(cfg)
                checked_endpoint(cfg).close()
            else:
                self.command(name).check(cfg)
        except SystemExit as end:
            return str(end.code)
        except MENDABLE as error:
            return str(error) or "nothing was said"
        return ""

    def without_hydra(self, cfg: DictConfig) -> DictConfig:
        OmegaConf.set_struct(cfg, False)
        cfg.pop("hydra", None)
        OmegaConf.set_struct(cfg, True)
        return cfg


def faults(lines: int, seed: int, folder: Path) -> Iterator[tuple[str, list[str], str]]:
    """Every line with its end: ``run``, ``named``, or what is wrong with how it ended.

    To be called inside ``initialize_config_dir``.
    """
    fuzz = Fuzz(folder, random.Random(seed))
    for file in ("last.ckpt", "step_time.json"):
        (folder / file).touch()
    for _ in range(lines):
        name, base, given = fuzz.line()
        try:
            said = fuzz.verdict(name, [*base, *given])
        except Exception as error:
            yield name, [*base, *given], f"{type(error).__name__}: {str(error)[:300]}"
            continue
        keys = ["overrides"] if name == "stored" else []
        for word in given:
            key = word.lstrip("+~").partition("=")[0]
            keys += [key, key.rpartition(".")[0] or key]
        named = any(re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", said) for key in keys)
        wrong = f"names no key: {said[:300]}"
        yield name, [*base, *given], "run" if not said else "named" if named else wrong


def _is_group(override: str) -> bool:
    key = override.lstrip("+~").partition("=")[0]
    return (CONFIGS / key).is_dir() and not override.startswith("~")


def _keys(node: Any, key: str = "") -> Iterator[str]:
    for name in node:
        where = f"{key}.{name}" if key else str(name)
        yield where
        inner = node._get_node(name)
        if isinstance(inner, DictConfig) and not inner._is_none() and not inner._is_interpolation():
            yield from _keys(inner, where)


def main() -> int:
    """Print what went wrong and the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start, counts = time.perf_counter(), Counter[str]()
    logging.disable(logging.WARNING)
    configs = initialize_config_dir(str(CONFIGS), version_base="1.3")
    with tempfile.TemporaryDirectory() as folder, configs:
        for name, given, end in faults(options.lines, options.seed, Path(folder)):
            counts[end if end in ("run", "named") else "wrong"] += 1
            if end not in ("run", "named"):
                print(f"{name} {' '.join(word[:80] for word in given)}\n    {end}", flush=True)
    print(f"{dict(counts)} of {options.lines} lines in {time.perf_counter() - start:.0f} s")
    return int(bool(counts["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
