"""Rows of anyone's data: where they come from, how they are split, and what is asked of each."""

from __future__ import annotations

import os
import pickle
import pkgutil
import random
import re
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from string import Formatter
from typing import Any

from aem_lightning.envs.questions import Rows

Row = Mapping[str, Any]
FILES = {"jsonl": "json", "json": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet"}


def read_splits(dataset: Any, subset: str | None, validation: float) -> dict[str, Sequence[Row]]:
    """The rows of each split, ``train`` first; of data without one, a fixed share is validation's.

    Args:
        dataset: Rows (a list of dictionaries, a `datasets.Dataset`, a frame of pandas), a function
            that returns them or its path, a file, a folder or a name of the Hugging Face hub, or a
            mapping of splits to these.
        subset: Of a name on the hub.
        validation: The share of the only split that becomes ``valid``.

    Raises:
        ValueError: It is none of these, or a split is empty.
        FileNotFoundError: There is no such file.
    """
    found = _found(dataset, subset)
    splits = found if isinstance(found, Mapping) else {"train": found}
    parts = {str(name): _only(name, _found(rows, subset)) for name, rows in splits.items()}
    if len(parts) == 1:
        return _divided(next(iter(parts.values())), validation)
    if "train" not in parts:
        raise ValueError(
            f"datamodule.dataset has the splits {', '.join(parts)}, and none is called train: type "
            "datamodule.dataset={train: ..., valid: ...}"
        )
    return {"train": parts.pop("train"), **parts}


def _found(given: Any, subset: str | None) -> Any:
    if isinstance(given, str) and re.fullmatch(r"[\w.]+\.\w+", given) and not _kind(given):
        given = _by_path(given)
    rows = given() if callable(given) else given
    if hasattr(rows, "itertuples"):  # of pandas
        rows = rows.to_dict("records")
    return _read(rows, subset) if isinstance(rows, str | os.PathLike) else rows


def _by_path(name: str) -> Any:
    """What has the path ``name``; itself where it may be a name of the hub, which look so, too.

    Raises:
        ValueError: Its module is there, and has no such thing, or cannot be imported.
    """
    try:
        return pkgutil.resolve_name(name)
    except Exception as error:  # a module runs whatever it likes
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing == name.partition(".")[0] or Path(name).exists():
            return name
        raise ValueError(
            f"datamodule.dataset={name}: {type(error).__name__}: {error}. Type the path of rows or "
            "of a function that returns them, my_module.my_rows, a file, or a name of the hub"
        ) from error


def _kind(name: str | os.PathLike[str]) -> str | None:
    """What a file's name says that it is."""
    return FILES.get(os.fspath(name).removesuffix(".gz").rpartition(".")[2].lower())


def _read(name: str | os.PathLike[str], subset: str | None) -> Any:
    """What a file, a folder or the hub holds."""
    import datasets

    path = Path(name).expanduser()
    kind = _kind(path)
    if kind is not None and not path.is_file():
        raise FileNotFoundError(
            f"datamodule.dataset={name}: there is no such file. Give one of .jsonl, .csv or "
            ".parquet, a folder, or a name of the Hugging Face hub, e.g. openai/gsm8k"
        )
    tabs = {"sep": "\t"} if ".tsv" in path.name else {}
    try:
        if kind is not None:
            return datasets.load_dataset(kind, data_files=str(path), **tabs)
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path if path.is_dir() else name), subset)
    except Exception as error:  # each of its readers has errors of its own
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(
            f"datamodule.dataset={name}: it cannot be read ({type(error).__name__}: {reason}). "
            "Give a file (.jsonl, .csv, .parquet), a folder, or a name of the Hugging Face hub, "
            "with datamodule.subset=... where it has several"
        ) from error


def _only(name: Any, rows: Any) -> Sequence[Row]:
    """The rows of one split."""
    if isinstance(rows, Mapping) and len(rows) == 1:  # a file is a data set of one split
        rows = next(iter(rows.values()))
    if isinstance(rows, Iterable) and not isinstance(rows, Mapping | str):
        rows = rows if hasattr(rows, "__getitem__") else list(rows)
        if len(rows) and isinstance(rows[0], Mapping):
            return rows  # type: ignore[no-any-return]
    shown = repr(rows)[:100]
    raise ValueError(
        f"datamodule.dataset: {shown} as the split {name!r}; expected rows, at least one, each a "
        "mapping of columns to values"
    )


def _divided(rows: Sequence[Row], validation: float) -> dict[str, Sequence[Row]]:
    if len(rows) < 2:
        raise ValueError("datamodule.dataset has one row: two are the fewest, one to evaluate on")
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)  # whatever the run's seed: all runs are evaluated on the same
    count = min(len(rows) - 1, max(1, round(validation * len(rows))))
    parts = {"train": sorted(order[count:]), "valid": sorted(order[:count])}
    return {name: [rows[i] for i in places] for name, places in parts.items()}


def named_function(key: str, given: Any) -> Callable[..., Any]:
    """The function that is ``given`` itself or by its path, if a worker can import it, too.

    Raises:
        ValueError: There is none, or only this process has it.
    """
    function = given
    if isinstance(given, str):
        try:
            function = pkgutil.resolve_name(given)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"datamodule.{key}={given}: {error}. Type the path of a function, "
                "my_module.my_function, of a module that Python finds: a file beside train.py, or "
                "PYTHONPATH=<its folder> before the command"
            ) from None
    if not callable(function):
        raise ValueError(f"datamodule.{key}={given!r}: expected a function, or the path of one")
    try:
        private = b"__main__" in pickle.dumps(function)
    except Exception:  # a lambda, a function inside another one
        private = True
    if private:
        raise ValueError(
            f"datamodule.{key}={getattr(function, '__qualname__', function)}: a worker process "
            "cannot import it. Write it as a function of a file of its own, and import it from "
            "there"
        )
    return function  # type: ignore[no-any-return]


def asker(prompt: Any, columns: Iterable[str]) -> Callable[[Row], Any]:
    """From a row to its question: a column, a format of columns, or a function.

    Raises:
        ValueError: It is none of these.
    """
    names = [str(column) for column in columns]
    if isinstance(prompt, str) and prompt in names:
        return lambda row: _by_name(row)[prompt]
    if isinstance(prompt, str) and "{" in prompt:
        try:
            asked = list(_columns(prompt))
            if unknown := [name for name in asked if name not in names]:
                raise LookupError(f"there is no column {unknown[0]!r}")
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"datamodule.prompt={prompt!r} cannot be filled in: {error}. Columns: "
                f"{', '.join('{' + name + '}' for name in names)}; write a literal brace twice"
            ) from None
        return partial(_filled, prompt, asked)
    try:
        return named_function("prompt", prompt)
    except ValueError as error:
        raise ValueError(f"{error}; or one of the columns {', '.join(names)}") from None


class _Filling(Formatter):
    """A format whose fields are all names, numbers too."""

    def get_value(self, key: int | str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        return kwargs[str(key)]


def _columns(prompt: str) -> Iterator[str]:
    """The columns of a format: of ``{a[0].b:>{width}}`` those are ``a`` and ``width``."""
    for _, field, spec, _ in Formatter().parse(prompt):
        if field is not None:
            yield re.split(r"[.\[]", field)[0]
            yield from _columns(spec or "")


def _filled(prompt: str, asked: Sequence[str], row: Row) -> str:
    """The format ``prompt`` of a row.

    Raises:
        ValueError: A column of it is empty.
    """
    named = _by_name(row)
    for name in asked:
        value = named[name]
        is_cell = not hasattr(value, "__len__")  # texts, lists and arrays are never missing
        if value is None or (is_cell and str(value).lower() in ("nan", "nat", "<na>")):
            raise ValueError(f"the column {name} is empty")
    return _Filling().vformat(prompt, (), named)


def _by_name(row: Row) -> dict[str, Any]:
    return {str(name): value for name, value in row.items()}


def row_file(rows: Iterable[Row], ask: Callable[[Row], Any], score: Callable[..., Any]) -> Rows:
    """The rows and their questions in a temporary file, which is gone with what is returned.

    Raises:
        ValueError: ``ask`` raised, or made no text of a row.
    """
    handle, path = tempfile.mkstemp(prefix="aem-rows-")
    found = Rows(path, array("Q"), score)
    weakref.finalize(found, _remove, path, os.getpid())
    with open(handle, "wb") as file:
        for number, row in enumerate(rows):
            found.offsets.append(file.tell())
            pickle.dump({"question": _question(number, row, ask), "row": dict(row)}, file)
    return found


def _question(number: int, row: Row, ask: Callable[[Row], Any]) -> str:
    try:
        question = ask(row)
    except Exception as error:
        raise ValueError(
            f"datamodule.prompt raised {type(error).__name__}: {error} on row {number}, "
            f"{dict(row)!r:.200}"
        ) from error
    if not isinstance(question, str):
        raise ValueError(
            f"datamodule.prompt made {question!r:.100} of row {number}; expected a text"
        )
    return question


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner and os.path.exists(path):
        os.unlink(path)
