"""What can be told of a config before torch, transformers and Lightning are imported.

A command asks here first, so that a mistake is answered at once; a run asks again, for callers from
Python and for the jobs of ``--multirun``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig

from aem_lightning.runner.checkpoints import find_checkpoint, needed_checkpoint
from aem_lightning.runner.checks import check_api_config, check_config


def check_training(cfg: DictConfig) -> None:
    """Raise where ``cfg``, of ``configs/train.yaml``, cannot run.

    Raises:
        ConfigError: Values that cannot be.
        FileNotFoundError: Files that are not there.
    """
    check_config(cfg)
    find_checkpoint(cfg, cfg.name)
    missing = list(_missing_data(cfg.datamodule, cfg.datamodule.get("evaluation_splits") or ()))
    if cfg.stage != "check":  # which has no policy
        missing += _missing_policy_files(cfg.policy)
    _raise(missing)


def check_evaluation(cfg: DictConfig) -> None:
    """Raise where ``cfg``, of ``configs/eval.yaml``, cannot run.

    Raises:
        ConfigError: Values that cannot be.
        FileNotFoundError: Files that are not there.
        ValueError: A policy that an evaluation cannot have, or no checkpoint.
    """
    policy = cfg.get("policy")
    if policy == "api":
        check_api_config(cfg)
        splits = cfg.splits or cfg.datamodule.get("evaluation_splits") or ()
        _raise(list(_missing_data(cfg.datamodule, splits)))
    elif policy is not None:
        raise ValueError(
            "policy=...: an evaluation plays the policy of its checkpoint, or a model behind an "
            "endpoint. Type ckpt_path=<file>, or policy=api base_url=... model=..."
        )
    else:
        needed_checkpoint(cfg, cfg.run)


def read_template(template: str) -> str:
    """A chat template from a file, or ``template`` itself where it is one.

    Raises:
        FileNotFoundError: It is neither.
    """
    if "{%" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"policy.chat_template={template}: there is no such file. Give one with a Jinja "
            "template in it, or the template itself."
        )
    return path.read_text(encoding="utf-8")


def _raise(missing: Sequence[str]) -> None:
    if missing:
        raise FileNotFoundError("\n".join(missing))


def _missing_policy_files(policy: DictConfig) -> Iterator[str]:
    """What to say of the model's folder and of the chat template, where they are missing."""
    model = policy.model
    if model is not None and is_path(str(model)) and not Path(model).expanduser().is_dir():
        yield (
            f"policy.model={model}: there is no such folder. Give the folder of a model, or its "
            "name on the Hugging Face hub, or type policy=tiny"
        )
    if policy.chat_template is not None:
        yield from _told(lambda: read_template(policy.chat_template))


def is_path(model: str) -> bool:
    """Whether ``model`` can only be a folder: a name on the hub is ``name`` or ``owner/name``."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1 or "\\" in model


def _missing_data(datamodule: DictConfig, splits: Sequence[str]) -> Iterator[str]:
    """What to say of official data that is not where ``datamodule`` looks for it."""
    find = _OFFICIAL.get(str(datamodule.get("_target_")))
    if find is not None:
        # The split that is trained on, and those that are played in evaluations.
        yield from _told(lambda: find(datamodule, ["train", *splits]))


def _told(find: Callable[[], object]) -> Iterator[str]:
    try:
        find()
    except FileNotFoundError as error:
        yield str(error)


def _alfworld(datamodule: DictConfig, splits: Sequence[str]) -> None:
    from aem_lightning.envs.data import alfworld_folder

    if datamodule.generate is None:
        for split in splits:
            alfworld_folder(Path(datamodule.root).expanduser().absolute(), split)


def _webshop(datamodule: DictConfig, splits: Sequence[str]) -> None:
    from aem_lightning.envs.data import check_webshop_files, webshop_paths

    if datamodule.generate is None:
        names = {name: datamodule[name] for name in ("goals", "products", "attributes", "human")}
        root = Path(datamodule.root).expanduser().absolute()
        check_webshop_files(webshop_paths(root, **names).values())


def _swe(datamodule: DictConfig, splits: Sequence[str]) -> None:
    from aem_lightning.envs.data import swe_file

    if datamodule.source in ("json", "parquet"):
        for split in splits:
            if split in datamodule.splits:
                swe_file(datamodule.splits[split], split)


_OFFICIAL: dict[str, Callable[[DictConfig, Sequence[str]], None]] = {
    "aem_lightning.datamodules.AlfworldDataModule": _alfworld,
    "aem_lightning.datamodules.WebShopDataModule": _webshop,
    "aem_lightning.datamodules.SweDataModule": _swe,
}
