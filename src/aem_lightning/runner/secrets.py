"""Keys and passwords that were typed into a config, which a run writes to many files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from aem_lightning.runner.schema import leaves

_NAME = re.compile(
    r"(.*[_-])?(api[_-]?key|authorization|passw(or)?d|passphrase|credentials?|secret|"
    r"(secret|access|private|wandb)[_-]key|"
    r"(access|api|auth|bearer|gh|git(hub|lab)|hf|refresh)[_-]token)|key|token",
    re.IGNORECASE,
)
# As environment variables are written; `max_new_tokens` and `pad_token` are none of these.
_VARIABLE = re.compile(r"[A-Z0-9_]*(TOKEN|SECRET|PASSWORD|PASSWD|KEY)")
_WORDS = r"(api[_-]?key|key|token|secret|password|sig|signature)"
_URL = re.compile(rf"[a-z][a-z0-9+.-]*://([^/?#\s]*@|\S*[?&;]\w*{_WORDS}=)", re.I)


def secrets_in(cfg: DictConfig) -> dict[str, str]:
    """The keys and passwords that ``cfg`` holds, by where they stand.

    One that an environment variable holds (``${oc.env:NAME}``) is written nowhere, and is let be.
    """
    return {
        key: value
        for key, value in leaves(OmegaConf.to_container(cfg, resolve=False))
        if isinstance(value, str) and value and "${" not in value
        if _URL.match(value) or _is_secret(key.rpartition(".")[2])
    }


def _is_secret(name: str) -> bool:
    return bool(_NAME.fullmatch(name) or _VARIABLE.fullmatch(name))


def typed_secrets(overrides: Sequence[str]) -> dict[str, str]:
    """The same of overrides, before Hydra reads them; of those that cannot be read, nothing."""
    try:
        return secrets_in(OmegaConf.from_dotlist([word.lstrip("+~") for word in overrides]))
    except Exception:  # whatever YAML's parser says: Hydra's says it better
        return {}


def secrets_of_run(folder: Path) -> dict[str, str]:
    """The same of the config that a run has left in ``folder``; nothing where it left none."""
    file = folder / ".hydra" / "config.yaml"
    if not file.is_file():
        return {}
    loaded = OmegaConf.load(file)
    return secrets_in(loaded) if isinstance(loaded, DictConfig) else {}


def without_secrets(found: dict[str, str]) -> list[str]:
    """What to type instead; the secrets themselves are not repeated."""
    return [
        f"{key}: a key or password does not belong in a config, which a run writes to its files. "
        + (
            "Type the address without it, and api_key_env=<the environment variable that holds it>"
            if "://" in value
            else f"Put it into an environment variable and type '{key}=${{oc.env:NAME}}'"
        )
        for key, value in found.items()
    ]


def scrub(folder: Path, found: dict[str, str]) -> None:
    """Take the secrets out of the YAML files that Hydra has written to ``folder`` already."""
    for file in folder.rglob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        for value in found.values():
            text = text.replace(value, "***")
        file.write_text(text, encoding="utf-8")
