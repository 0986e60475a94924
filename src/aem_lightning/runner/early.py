"""What can be told of a config before torch, transformers and Lightning are imported.

A command asks here first, so that a mistake is answered at once; a run asks again, for callers from
Python and for the jobs of ``--multirun``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from aem_lightning.runner.adapter_folder import CONFIG, is_path, read_adapter
from aem_lightning.runner.checkpoints import find_checkpoint, needed_checkpoint
from aem_lightning.runner.checks import (
    EvalOptions,
    ModelOptions,
    check_api_config,
    check_config,
    refuse,
    wrong_options,
)
from aem_lightning.runner.folder import check_free
from aem_lightning.runner.trust import literal

KEY = "policy.warm_start.demonstrations_from"
# What the files of demonstrations end with, and what `datasets` calls them.
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def check_training(cfg: DictConfig) -> None:
    """Raise where ``cfg``, of ``configs/train.yaml``, cannot run.

    Raises:
        ConfigError: Values that cannot be.
        FileNotFoundError: Files that are not there.
    """
    if cfg.get("profile"):  # read where torch is first imported: it warns at every pause of a trace
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    check_config(cfg)
    if cfg.ckpt_path is not None and cfg.stage != "train":
        refuse(
            [
                f"ckpt_path={cfg.ckpt_path} stage={cfg.stage}: only a training run goes on from a "
                "checkpoint. Type one of them alone"
            ]
        )
    if cfg.get("optimized_metric") and not cfg.evaluate:
        refuse([f"optimized_metric={cfg.optimized_metric} evaluate=false: type evaluate=true"])
    find_checkpoint(cfg, cfg.name)
    if "hydra" in cfg:  # composed before the run: Hydra has not written into its folder yet
        check_free(Path(cfg.hydra.run.dir))
    splits = _splits(cfg.datamodule.get("evaluation_splits"))
    finds: list[Callable[[], object]] = [partial(_find_data, cfg.datamodule, splits)]
    if cfg.stage != "check":  # which has no policy
        base = cfg.policy.warm_start.get("base") if cfg.policy.model is None else None
        finds.append(partial(_find_model, "policy.model", cfg.policy.model))
        finds.append(partial(_find_model, "policy.warm_start.base", base))
        finds.append(partial(read_template, cfg.policy.chat_template))
        finds.append(partial(demonstration_files, cfg.policy.warm_start.get("demonstrations_from")))
    missing = []
    for find in finds:
        try:
            find()
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        raise FileNotFoundError("\n".join(missing))


def check_evaluation(cfg: DictConfig) -> None:
    """Raise where ``cfg`` cannot run: of ``configs/eval.yaml``, or, of a model, of ``train.yaml``.

    Raises:
        ConfigError: Values that cannot be.
        FileNotFoundError: Files that are not there.
        ValueError: A policy that an evaluation cannot have, or no checkpoint.
    """
    policy = cfg.get("policy")
    if policy is None:
        refuse([*wrong_options(cfg, EvalOptions), *_strange_adapter(cfg)])
        needed_checkpoint(cfg, cfg.run)
    elif policy == "api":
        refuse([*_strange_adapter(cfg)])
        check_api_config(cfg)
        splits = _splits(cfg.splits or cfg.datamodule.get("evaluation_splits"))
        _find_data(cfg.datamodule, splits)
    elif isinstance(policy, DictConfig):
        check_training(with_base_model(cfg))
    else:
        raise ValueError(
            f"policy={policy}: an evaluation plays a checkpoint, a model with or without an "
            "adapter, or one behind an endpoint. Type ckpt_path=<file>, policy.model=<folder>, "
            "adapter=<folder>, or policy=api base_url=... model=..."
        )


def _strange_adapter(cfg: DictConfig) -> Iterator[str]:
    if cfg.get("adapter") is not None:
        yield (
            f"adapter={cfg.adapter}: it is played in the place of a checkpoint or endpoint. Type "
            "one of them alone"
        )


def with_base_model(cfg: DictConfig) -> DictConfig:
    """``cfg``, of an evaluation of a model, with the model that its adapter was trained on.

    Raises:
        ConfigError: A wish that cannot be, or an adapter that is not played.
        FileNotFoundError: There is no such adapter, or its model is not there.
    """
    refuse(wrong_options(cfg, ModelOptions, whole=False))
    if cfg.ckpt_path is not None:
        refuse([f"ckpt_path={cfg.ckpt_path}: a checkpoint has a model of its own: type it alone"])
    typed = cfg.policy.get("model")
    if cfg.get("adapter") is not None and isinstance(typed, str | None):
        cfg, adapter = cfg.copy(), read_adapter(cfg.adapter)
        cfg.policy.model = literal(adapter.base_model(typed))
        OmegaConf.update(cfg, "policy.lora.r", adapter.rank)  # what engine=vllm tells of itself
    return cfg


def _splits(given: Any) -> Sequence[str]:
    """The names in a list; where there is none, `parts` says what is wrong with it."""
    return [str(split) for split in given] if isinstance(given, ListConfig) else []


def read_template(template: str | None) -> str | None:
    """A chat template from a file, or ``template`` itself where it is one, or none.

    Raises:
        FileNotFoundError: It is neither.
    """
    if template is None or "{%" in template:
        return template
    path = Path(template).expanduser()
    if not os.path.isfile(path):  # no error where the name is longer than names can be
        raise FileNotFoundError(
            f"policy.chat_template={template}: there is no such file. Give one with a Jinja "
            "template in it, or the template itself."
        )
    return path.read_text(encoding="utf-8")


def demonstration_files(source: str | None) -> list[Path]:
    """The files of recorded chats in ``source``, a file or folder; none for ``None``.

    Raises:
        FileNotFoundError: It is not there, or holds none.
    """
    if source is None:
        return []
    place = Path(source).expanduser()
    inside = sorted(p for p in place.rglob("*") if p.is_file()) if os.path.isdir(place) else [place]
    saved = [p for p in inside if p.name in ("state.json", "dataset_dict.json")]
    files = inside if saved else [p for p in inside if p.suffix in KINDS and os.path.isfile(p)]
    if not files:
        raise FileNotFoundError(
            f"{KEY}={source}: there are no demonstrations. Give a folder that `datasets` saved "
            f"(save_to_disk), or files that end in {', '.join(KINDS)}"
        )
    return files


def _find_model(key: str, model: str | None) -> None:
    if model is None:
        return
    folder = Path(model).expanduser()
    if not os.path.isdir(folder):
        if is_path(model):
            raise FileNotFoundError(
                f"{key}={model}: there is no such folder. Give the folder of a model, or its "
                "name on the Hugging Face hub, or type policy=tiny; `make model` makes SmolLM2's"
            )
    elif (folder / CONFIG).is_file():  # transformers would put it on its model without a word
        raise FileNotFoundError(
            f"{key}={model}: an adapter, not a model. python eval.py adapter={model} plays "
            "it; give the folder of a model to train"
        )
    elif not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{key}={model}: there is no model in it (no config.json). Give a folder that "
            "save_pretrained wrote"
        )


@contextlib.contextmanager
def _whatever_type() -> Iterator[None]:
    """Let a value of another type than it should be pass: `parts` says which."""
    with contextlib.suppress(TypeError, AttributeError):
        yield


@_whatever_type()
def _find_data(datamodule: DictConfig, evaluation_splits: Sequence[str]) -> None:
    """Raise where official data is not where ``datamodule`` looks for it."""
    from aem_lightning.envs.data import (
        alfworld_folder,
        check_webshop_files,
        swe_file,
        webshop_paths,
    )

    package, _, name = str(datamodule.get("_target_")).rpartition(".")
    kind = name if package == "aem_lightning.datamodules" else None
    splits = ["train", *evaluation_splits]
    if kind == "AlfworldDataModule" and datamodule.generate is None:
        for split in splits:
            alfworld_folder(Path(datamodule.root).expanduser().absolute(), split)
    elif kind == "WebShopDataModule" and datamodule.generate is None:
        names = {key: datamodule[key] for key in ("goals", "products", "attributes", "human")}
        root = Path(datamodule.root).expanduser().absolute()
        check_webshop_files(webshop_paths(root, **names).values())
    elif kind == "SweDataModule" and datamodule.source in ("json", "parquet"):
        for split in splits:
            if split in datamodule.splits:
                swe_file(datamodule.splits[split], split)
