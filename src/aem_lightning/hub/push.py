"""What goes to the hub, laid out in a folder first, and its way there."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aem_lightning.hub.card import model_card
from aem_lightning.runner.adapter_folder import CONFIG, read_adapter
from aem_lightning.runner.secrets import secrets_of_run


@dataclass(frozen=True)
class Staged:
    """What is about to be pushed: folders by the repository that each goes to."""

    folders: dict[str, Path]

    @property
    def files(self) -> list[str]:
        """Every file, behind its repository."""
        return [
            f"{repo}/{path.relative_to(folder)}"
            for repo, folder in self.folders.items()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]


def stage(
    run: Path,
    repo: str,
    *,
    with_base: bool = False,
    base: str | None = None,
    license_: str | None = None,
) -> Staged:
    """Lay out the adapter of ``run`` in its folder ``hub``, with a card; nothing is sent.

    Args:
        run: A run's folder.
        repo: Where the adapter goes, ``owner/name``.
        with_base: Push the model that it was trained on, too, as ``<repo>-base``: where that is a
            folder of this machine, as after a warm start.
        base: The name that this model has on the hub already.
        license_: Of the adapter, by the hub's names.

    Raises:
        FileNotFoundError: There is no whole run, no adapter, or no model any more.
        ValueError: Nobody else would have the model that the adapter belongs to.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ValueError(f"--repo {repo}: give owner/name")
    adapter = read_adapter(str(run / "adapter"))
    known = adapter.base_model(None)
    local = Path(known).expanduser().is_dir()
    if local and not (with_base or base):
        raise ValueError(
            f"The adapter was trained on {known}, a folder of this machine: alone it would be of "
            f"no use. Type --with-base to push that model as {repo}-base, or --base owner/name "
            "where it is on the hub already"
        )
    name = base or (f"{repo}-base" if with_base and local else known)
    target = run / "hub"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(adapter.folder, target / "adapter", ignore=shutil.ignore_patterns("README.md"))
    _rename_base(target / "adapter", known, name)
    card = model_card(run, repo, name, license_=license_)
    (target / "adapter" / "README.md").write_text(_scrubbed(card, run), encoding="utf-8")
    folders = {repo: target / "adapter"}
    if with_base and local and base is None:
        shutil.copytree(Path(known).expanduser(), target / "base")
        (target / "base" / "warm_start.json").unlink(missing_ok=True)  # settings, and folders
        text = f"---\nlibrary_name: transformers\n---\n\n# {name.partition('/')[2]}\n\n"
        text += f"The model that the adapter [{repo}](https://huggingface.co/{repo}) belongs to."
        (target / "base" / "README.md").write_text(f"{text}\n", encoding="utf-8")
        folders[name] = target / "base"
    return Staged(folders)


def push(staged: Staged, *, private: bool = False, endpoint: str | None = None) -> list[str]:
    """Send what was staged; the addresses of the commits.

    Raises:
        ConnectionError: The hub did not take it, and why.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(endpoint=endpoint)
    sent = []
    try:
        # The model first: an adapter alone is of no use.
        for repo, folder in reversed(staged.folders.items()):
            api.create_repo(repo, private=private, exist_ok=True)
            message = "Adapter and card" if (folder / CONFIG).is_file() else "The adapter's model"
            done: Any = api.upload_folder(
                repo_id=repo, folder_path=str(folder), commit_message=message
            )
            sent.append(str(done.commit_url))
    except (HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OSError) as error:
        raise ConnectionError(
            f"The hub took {len(sent)} of {len(staged.folders)} repositories: {error}\nTo log in, "
            "type: hf auth login (or HF_TOKEN=...), with a token that may write"
        ) from error
    return sent


def _rename_base(folder: Path, known: str, name: str) -> None:
    """Call the base by its ``name`` on the hub, wherever the adapter's files name it."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = name
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    for file in folder.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        if json.dumps(known) in text:
            file.write_text(text.replace(json.dumps(known), json.dumps(name)), encoding="utf-8")


def _scrubbed(card: str, run: Path) -> str:
    """``card`` without keys and passwords of the run's config, or of this shell."""
    secret = [*secrets_of_run(run).values(), os.environ.get("HF_TOKEN", "")]
    for value in filter(None, secret):
        card = card.replace(value, "***")
    return card
