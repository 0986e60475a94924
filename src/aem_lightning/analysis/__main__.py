"""The command ``python -m aem_lightning.analysis <name> key=value ...``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import hydra
from omegaconf import DictConfig

from aem_lightning.analysis.compare import compare
from aem_lightning.analysis.cost import cost
from aem_lightning.analysis.masks import masks
from aem_lightning.analysis.proxy import proxy
from aem_lightning.analysis.training import find_configs
from aem_lightning.runner.cli import check_overrides, clear_errors, quiet_libraries

ANALYSES: dict[str, Callable[[DictConfig], dict[str, Any]]] = {
    "proxy": proxy,
    "masks": masks,
    "compare": compare,
    "ablations": compare,
    "cost": cost,
}


def main() -> None:
    """Run the analysis that the first argument names; the others are overrides."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in ANALYSES:
        sys.exit(
            f"{name or 'no name'}: there is no such analysis. Type "
            f"python -m aem_lightning.analysis <{'|'.join(ANALYSES)}> key=value ...; "
            "options: configs/analysis/<name>.yaml"
        )
    configs, analysis = find_configs(), ANALYSES[name]
    arguments = sys.argv[2:]
    command = f"python -m aem_lightning.analysis {name}"
    check_overrides(configs, f"analysis/{name}", arguments, command)
    sys.argv = [sys.argv[0], *arguments]

    def run(cfg: DictConfig) -> None:
        quiet_libraries()
        with clear_errors():
            analysis(cfg)

    hydra.main(version_base="1.3", config_path=str(configs), config_name=f"analysis/{name}")(run)()


if __name__ == "__main__":
    main()
