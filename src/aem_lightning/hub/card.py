"""The model card of a run: results with their intervals, how it was made, how it is played."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from aem_lightning.card import Success, run_card
from aem_lightning.runner.secrets import typed_secrets

SETTINGS = (
    *("iterations", "tasks_per_iteration", "group_size", "memory", "max_turns", "max_new_tokens"),
    *("temperature", "update_epochs", "num_minibatches", "seed"),
)
# Of the machine that trained, and no one else's business.
_OF_A_MACHINE = ("paths.", "hydra.", "ckpt_path", "logger", "trainer.")
_PLACE = re.compile(r"://|(^|[\s'\"\[{,:=])(/|~|\.{1,2}/|[A-Za-z]:\\)")
# What an evaluation has to be told again.
_OF_THE_GAME = ("experiment", "datamodule", "prompt", "memory", "history", "max_", "action")


def model_card(run: Path, repo: str, base: str, *, license_: str | None = None) -> str:
    """The text of ``README.md``, metadata first.

    Args:
        run: A run's folder.
        repo: Where the adapter goes, ``owner/name``.
        base: The model that it belongs to, on the hub.
        license_: Of the adapter, by the hub's names.
    """
    from huggingface_hub import ModelCard, ModelCardData

    summary, config = read_run(run)
    task, splits = _task(config), _splits(config)
    metadata = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        license=license_,
        model_name=repo.partition("/")[2],
        tags=["lora", "reinforcement-learning", "llm-agent", "aem", "aem_lightning", task.lower()],
        eval_results=[*_results(summary, task, splits)] or None,
    )
    results = _table(summary)
    text = "\n\n".join(
        [
            f"---\n{metadata.to_yaml()}\n---",
            f"# {repo.partition('/')[2]}",
            f"A LoRA adapter of [{base}](https://huggingface.co/{base}) for {task}, trained by "
            "multi-turn reinforcement learning with aem_lightning.",
            f"## Results\n\n{results}",
            f"## How to play it\n\n{_usage(repo, base, _overrides(run))}",
            f"## How it was made\n\n{card_facts(run)}",
        ]
    )
    return str(ModelCard(f"{text}\n"))


def read_run(run: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The summary of a run and its config, as plain data.

    Raises:
        FileNotFoundError: The run has not come to its end, or ``run`` is none.
    """
    file = run / "summary.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: there is no such file. Give the folder of a run that came to its end, "
            "logs/<name>/<time>"
        )
    return json.loads(file.read_text(encoding="utf-8")), _yaml(run, "config.yaml") or {}


def card_facts(run: Path) -> str:
    """How a run was made, as markdown: command and settings, then the rest of its card."""
    _, config = read_run(run)
    parts = {name: _class(config.get(name)) for name in ("advantage", "modulation", "loss")}
    rows = {
        "algorithm": f"{config.get('algorithm')}: {', '.join(filter(None, parts.values()))}",
        **{name: config[name] for name in SETTINGS if name in config},
        "learning rate": (config.get("optimizer") or {}).get("lr"),
        "LoRA": _lora(run),
    }
    words = shlex.join(["python", "train.py", *_overrides(run)])
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    told = f"```bash\n{words}\n```\n\n| setting | value |\n|---|---|\n{table}"
    # Its own command may name folders; results stand above, and settings in the table.
    card = replace(run_card(run), command=None, success={}, seed=None, iterations=None)
    return f"{told}\n\n{card.markdown()}"


def public_overrides(words: Sequence[str]) -> list[str]:
    """The overrides that anybody may read: no keys, passwords, addresses or folders."""
    secret = typed_secrets(words)
    return [
        word
        for word in words
        if (key := word.lstrip("+~").partition("=")[0]) not in secret
        and not key.startswith(_OF_A_MACHINE)
        and not _PLACE.search(word.partition("=")[2])
    ]


def _results(summary: Mapping[str, Any], task: str, splits: str) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="reinforcement-learning",
            task_name="multi-turn agent",
            dataset_type=task.lower(),
            dataset_name=task,
            dataset_split=splits or None,
            metric_type="success_rate",
            metric_name=f"success rate {moment}, 95 % interval [{r['low']:.3f}, {r['high']:.3f}]",
            metric_value=round(r["rate"], 4),
        )
        for moment, r in _success(summary).items()
    ]


def _success(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    both = {"before training": "success_before", "after training": "success_after"}
    return {name: summary[key] for name, key in both.items() if summary.get(key)}


def _table(summary: Mapping[str, Any]) -> str:
    found = _success(summary)
    if not found:
        return "The run was not evaluated (evaluate=false)."
    kinds = sorted({kind for result in found.values() for kind in result.get("by_type", {})})
    lines = [
        f"| success rate | {' | '.join(found)} |",
        f"|---|{'---|' * len(found)}",
        f"| all | {' | '.join(str(Success.of(result)) for result in found.values())} |",
    ]
    for kind in kinds:
        cells = (result["by_type"].get(kind) for result in found.values())
        shown = ("–" if cell is None else str(Success.of(cell)) for cell in cells)
        lines.append(f"| {kind} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", "Wilson intervals of 95 %, over evaluation tasks."])


def _usage(repo: str, base: str, overrides: Sequence[str]) -> str:
    game = [word for word in overrides if word.startswith(_OF_THE_GAME)]
    return (
        f"```bash\nhf download {repo} --local-dir adapter\n"
        f"{shlex.join(['python', 'eval.py', *game, 'adapter=adapter'])}\n```\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(base, "{repo}")\n```'
    )


def _task(config: Mapping[str, Any]) -> str:
    return (_class(config.get("datamodule")) or "unknown").removesuffix("DataModule")


def _splits(config: Mapping[str, Any]) -> str:
    return ", ".join(map(str, (config.get("datamodule") or {}).get("evaluation_splits") or ()))


def _class(node: Any) -> str:
    return str(node["_target_"]).rpartition(".")[2] if isinstance(node, dict) and node else ""


def _lora(run: Path) -> str:
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    return f"rank {adapter['r']}, alpha {adapter['lora_alpha']}"


def _overrides(run: Path) -> list[str]:
    return public_overrides([str(word) for word in _yaml(run, "overrides.yaml") or ()])


def _yaml(run: Path, name: str) -> Any:
    file = run / ".hydra" / name
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
