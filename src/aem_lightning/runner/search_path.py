"""Configs of other packages: what an installed package announces is an option like our own.

A package says in its ``pyproject.toml`` which module holds its YAML files, laid out as ours are
(``<module>/datamodule/<name>.yaml`` is ``datamodule=<name>``)::

    [project.entry-points."aem_lightning.configs"]
    my_package = "my_package"

Files of our own come first where two have one name, and files of the folder that a person names
with ``--config-dir`` before them. Without an installed package the same takes
``hydra.searchpath=[pkg://my_package]`` or ``hydra.searchpath=[file:///a/folder]``.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from aem_lightning.runner.shipped import shipped

GROUP = "aem_lightning.configs"


class InstalledConfigs(SearchPathPlugin):  # Hydra asks for its own base class
    """Adds our configs and those of ``aem_lightning.configs`` to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra wherever it composes a config."""
        ours = f"file://{shipped('configs')}"
        if ours not in [place.path for place in search_path.get_path()]:
            search_path.append(provider="aem_lightning", path=ours)
        for name, module in sorted({(e.name, e.value) for e in entry_points(group=GROUP)}):
            search_path.append(provider=name, path=f"pkg://{module}")


def register() -> None:
    """Make Hydra ask `InstalledConfigs`; a second call does nothing."""
    Plugins.instance().register(InstalledConfigs)
