"""The command ``python -m aem_lightning.analysis <name> key=value ...``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from aem_lightning.analysis.inputs import (
    check_batch,
    check_compare,
    check_cost,
    check_masks,
    check_proxy,
    check_testbeds,
)
from aem_lightning.runner.cli import quiet_libraries
from aem_lightning.runner.command import Command, configs_of
from aem_lightning.runner.help_page import first_sentence
from aem_lightning.runner.shipped import as_typed, shipped
from aem_lightning.runner.signals import stoppable

TYPED = "python -m aem_lightning.analysis"


@dataclass(frozen=True)
class Analysis:
    """Where an analysis is, imported when it is run, and what can be told of its config before.

    Attributes:
        function: Its function, and the module of this package that has it.
        check: Raises where its config cannot run.
        config: The name of its config, where that is another's; ``about`` says then what it is.
        settings: Overrides that make it this one, unless others are typed.
    """

    function: str
    check: Callable[[DictConfig], object] = lambda cfg: None
    config: str | None = None
    about: str = ""
    settings: tuple[str, ...] = ()

    def __call__(self, cfg: DictConfig) -> None:
        """Run it."""
        run = getattr(import_module(f"aem_lightning.analysis.{self.function}"), self.function)
        quiet_libraries()
        run(cfg)


ANALYSES = {
    "proxy": Analysis("proxy", check_proxy),
    "masks": Analysis("masks", check_masks),
    "compare": Analysis("compare", check_compare),
    "ablations": Analysis(
        *("compare", check_compare, "compare"),
        "The ablations of AEM as arms of a comparison; each is paired with the first arm.",
        (
            "arms=[grpo_aem,grpo,reversed,shuffled,trajectory,batch,entropy_sum,relative_surprisal]",
            # Arms that a comparison has trained are not trained again.
            "folder=${paths.log_dir}/compare/${experiment}",
        ),
    ),
    "cost": Analysis("cost", check_cost),
    "testbeds": Analysis("testbeds", check_testbeds),
    "batch": Analysis(
        *("batch", check_batch, "cost"),
        "The batch that a run could not compute with, stage by stage once more: where a number is "
        "infinite or none.",
    ),
}


def main() -> None:
    """Run the analysis that the first argument names; the others are overrides."""
    name, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if name in ("", "-h", "--help"):
        show_analyses(shipped("configs"))
        return
    if name not in ANALYSES:
        sys.exit(
            as_typed(
                f"{name}: there is no such analysis. Type {TYPED} <{'|'.join(ANALYSES)}> "
                f"key=value ...; what they are: {TYPED} --help"
            )
        )
    configs, analysis = configs_of(arguments), ANALYSES[name]
    config = analysis.config or name
    about = f"``{TYPED} {name} key=value ...``; options: configs/analysis/{config}.yaml."
    command = Command(configs, f"analysis/{config}", f"{TYPED} {name}", about, analysis.check)
    typed = {argument.partition("=")[0] for argument in arguments}
    own = [each for each in analysis.settings if each.partition("=")[0] not in typed]
    arguments = [f"name={name}", *own, *arguments] if analysis.config else arguments
    # To Hydra the word alone is the group, which an analysis does not compose.
    arguments = [re.sub(r"^\+*experiment=", "+typed_experiment=", word) for word in arguments]
    command.run(arguments, analysis)


def show_analyses(configs: Path) -> None:
    """Print every analysis with the first sentence of its config."""
    table = Table.grid(padding=(0, 2))
    for name, analysis in ANALYSES.items():
        own = analysis.about or first_sentence(configs / "analysis" / f"{name}.yaml")
        table.add_row(f"  {name}", own)
    console = Console(markup=False, highlight=False)
    console.print("The paper's analyses, each into a folder of figure, numbers and TensorBoard:\n")
    console.print(table)
    typed = as_typed(TYPED)
    console.print(f"\nType {typed} <name> key=value ...; options: {typed} <name> --help")


def run() -> None:
    """The command, which a signal ends as it ends a training run."""
    with stoppable():
        main()


if __name__ == "__main__":
    run()
