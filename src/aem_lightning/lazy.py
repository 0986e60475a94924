"""Names of a package that are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, homes: Mapping[str, Collection[str]]) -> Callable[[str], Any]:
    """The ``__getattr__`` of ``package``, of whose modules ``homes`` says which names each has.

    >>> lazily("json", {"decoder": ["JSONDecoder"]})("JSONDecoder").__name__
    'JSONDecoder'
    """

    def get(name: str) -> Any:
        for home, names in homes.items():
            if name in names:
                return getattr(import_module(f"{package}.{home}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
