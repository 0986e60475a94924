"""``python -m adapters``: the contract and a short training, name by name, as docs/adapters.md.

What is known already is not asked again, so a run that was stopped goes on. ``--only a,b`` takes
those names alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from runs import Keep, built, composed
from tiny_play import make_policy

from aem_lightning.envs import EnvContractError, check_env
from aem_lightning.runner.build import build_datamodule, instantiate

ROOT = Path(__file__).parents[2]
TARGET, KNOWN = ROOT / "docs" / "adapters.md", ROOT / "logs" / "adapters.jsonl"
PACKAGES = {"textarena": ("textarena", "env_id"), "reasoning_gym": ("reasoning-gym", "name")}
LIMIT_S = 90  # of a name
SMALL = (
    *("prompt=plain", "rewards=passthrough", "memory=window", "policy.lora.r=4"),
    *("iterations=1", "iterations_per_epoch=1", "tasks_per_iteration=2", "group_size=2"),
    *("max_turns=4", "max_new_tokens=8", "max_context=4096", "concurrency=4", "evaluate=false"),
    *("datamodule.sizes={train: 8, valid: 4}", "datamodule.validation_tasks=1"),
    "datamodule.timeout_s=20",
    *("datamodule.workers=1", "callbacks=null", "logger=null", "trainer.accelerator=cpu"),
)


def names(package: str) -> list[str]:
    """What the package offers one player: its games as they are, or its data sets."""
    if package == "reasoning_gym":
        from reasoning_gym.factory import DATASETS

        return sorted(set(DATASETS) - {"composite"})  # which is made of the others
    import textarena
    from textarena.envs.registration import ENV_REGISTRY

    def is_for_one(entry_point: str) -> bool:  # some games cannot be imported, or do not start
        place = entry_point.partition(":")[0].removeprefix("textarena.").replace(".", "/")
        source = Path(textarena.__file__).parent / f"{place}.py"
        return source.is_file() and "SinglePlayerState" in source.read_text(encoding="utf-8")

    return [
        name
        for name, spec in sorted(ENV_REGISTRY.items())
        if not name.endswith(("-raw", "-train")) and is_for_one(spec.entry_point)
    ]  # the others are the same games in other wrappers


def tried(package: str, name: str, model: Path) -> dict[str, str]:
    """What `check_env` says, and how many episodes of one iteration were whole."""
    key = PACKAGES[package][1]
    with tempfile.TemporaryDirectory() as folder:
        place = (f"paths.root_dir={folder}", f"paths.output_dir={folder}", f"policy.model={model}")
        words = [f"datamodule={package}", f"datamodule.env.{key}={name}", *SMALL, *place]
        cfg = composed(words)
        verdict = {"package": package, "name": name, "check": "kept", "trained": ""}
        try:
            check_env(build_datamodule(cfg), prompt=instantiate(cfg.prompt), resets=20)
        except EnvContractError as error:
            verdict["check"] = str(error).splitlines()[1]
        except TimeoutError as error:
            return verdict | {"check": str(error), "trained": "not tried"}
        keep = Keep()
        try:
            with built(cfg) as (trainer, module, datamodule):
                trainer.callbacks.append(keep)
                trainer.fit(module, datamodule=datamodule)
            played = [t for i in keep.iterations for t in i.played]
            whole = [t for t in played if not t.infra_error]
            verdict["trained"] = f"{len(whole)} of {len(played)} episodes"
        except Exception as error:
            verdict["trained"] = f"no: {type(error).__name__}: {error}"
    return {key: " ".join(text.split())[:300] for key, text in verdict.items()}


def page(verdicts: list[dict[str, str]]) -> str:
    """The table."""
    versions = ", ".join(f"{name} {version(name)}" for name, _ in PACKAGES.values())
    kept = sum(verdict["check"] == "kept" for verdict in verdicts)
    rows = [
        "| {package} | `{name}` | {check} | {trained} |".format(
            **{key: text.replace("|", "\\|") for key, text in verdict.items()}
        )
        for verdict in verdicts
    ]
    return "\n".join(
        [
            "# Games and data sets of other packages",
            "",
            f"Written by `make test-adapters`, with {versions}: {kept} of {len(verdicts)} keep the",
            "contract (`stage=check`, with 20 resets in search of leaks). Trained: the episodes of",
            "one iteration that were whole; the others are masked.",
            "",
            "| package | name | `stage=check` | trained |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def give_up(*_: object) -> None:
    """As where a game takes a minute to make its first position."""
    raise TimeoutError(f"no verdict in {LIMIT_S} s")


def main() -> None:
    """Try every name, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    only = parser.parse_args().only.split(",")
    logging.getLogger("aem_lightning").setLevel(logging.ERROR)
    KNOWN.parent.mkdir(exist_ok=True)
    lines = KNOWN.read_text(encoding="utf-8").splitlines() if KNOWN.is_file() else []
    verdicts = [json.loads(line) for line in lines]
    known = {(verdict["package"], verdict["name"]) for verdict in verdicts}
    signal.signal(signal.SIGALRM, give_up)
    model = Path(tempfile.mkdtemp()) / "model"
    make_policy(lora=False).save_model(model)
    for package in PACKAGES:
        for name in names(package):
            if (package, name) not in known and (name in only or only == [""]):
                signal.alarm(LIMIT_S)
                verdicts.append(tried(package, name, model))
                signal.alarm(0)
                with KNOWN.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(verdicts[-1]) + "\n")
                sys.stdout.write(f"{json.dumps(verdicts[-1], ensure_ascii=False)}\n")
                sys.stdout.flush()
    verdicts.sort(key=lambda verdict: (verdict["package"], verdict["name"]))
    TARGET.write_text(page(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main()
