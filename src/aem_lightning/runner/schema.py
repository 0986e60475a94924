"""The schema of a config: what is typed, held against the annotations of what it is typed for.

Settings and parts say themselves what they take: ``group_size: Count``, ``eps: Positive``. Values
are read strictly: no bool is a number, no text either, and a number is finite.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import SchemaError

_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
MISSING = "???"
ANYTHING = object()  # a value that is not known yet, or is complained of already
MOST = 2**31 - 1  # of a count: what no run reaches


def wrong_settings(
    of: type, given: Mapping[str, Any], key: str = "", *, whole: bool = False
) -> Iterator[str]:
    """What is wrong with ``given``, the settings ``of``, which stand at ``key``.

    Args:
        of: A dataclass, or a class whose keyword arguments they are.
        given: The values, plain ones.
        key: Where they stand in the config; empty for its top, where other keys are allowed.
        whole: Fields that have a default have to be given too, unless it is ``None``.
    """
    fields, _ = arguments_of(of)
    if not is_dataclass(of):  # the others are not for a config
        fields = {name: field for name, field in fields.items() if field.kind is field.KEYWORD_ONLY}
    for name in given if key else ():
        if name not in fields:
            yield f"{key}.{name}: there is no such key. Allowed: {', '.join(fields)}"
    for name, field in fields.items():
        where = f"{key}.{name}" if key else name
        if given.get(name, MISSING) != MISSING:
            value, kind = given[name], field.annotation
            yield from wrong_value(where, value, kind, field.default, whole=whole)
        elif field.default is field.empty or (whole and field.default is not None):
            yield f"{where} is not given: type {_plus(name, given)}{where}=..."


def wrong_value(
    key: str, value: Any, annotation: Any, default: Any = None, *, whole: bool = False
) -> Iterator[str]:
    """What is wrong with ``value`` at ``key``, where ``annotation`` says what is taken."""
    if value is ANYTHING:
        return
    kinds = _alternatives(annotation)
    settings = next(filter(None, map(_settings_in, kinds)), None)
    if settings is not None and isinstance(value, Mapping):
        yield from wrong_settings(settings, value, key, whole=whole)
        return
    inner = next((get_args(kind)[1] for kind in kinds if _is_mapping(kind)), Any)
    if isinstance(value, Mapping) and inner is not Any:
        for name, each in value.items():
            yield from wrong_value(f"{key}.{name}", each, inner)
    elif not any(fits(value, kind) for kind in kinds):
        choices = [choice for kind in kinds for choice in _choices(kind)]
        if choices:
            words = (choice if isinstance(choice, str) else shown(choice) for choice in choices)
            wanted = f"allowed are {', '.join(f'{key}={word}' for word in words)}"
            others = [kind for kind in kinds if not _choices(kind) and kind is not type(None)]
            wanted += "".join(f", or {_in_words(kind)}" for kind in others)
        else:
            wanted = " or ".join(map(_in_words, kinds))
        if type(default) in _NAMES and not choices:
            wanted += f", e.g. {key}={shown(default)}"
        yield f"{key}={shown(value)}: {wanted}"


def fits(value: Any, kind: Any) -> bool:
    """Whether a type takes ``value``; one that cannot be read takes everything."""
    if isinstance(kind, type) and (is_dataclass(kind) or kind is type(None)):
        return isinstance(value, kind)
    if _choices(kind):  # to Python True is 1: a choice of numbers would take it
        return any(value == choice and type(value) is type(choice) for choice in _choices(kind))
    try:
        check = _adapter(kind).validate_python
    except (PydanticUserError, SchemaError, TypeError, NameError):
        return True
    for given in (value, _with_tuples(value)):  # YAML knows lists alone
        with contextlib.suppress(ValidationError, TypeError, OverflowError):
            check(given)
            return True
    return False


def arguments_of(of: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The arguments of a class or function that have names, and whether it takes any others.

    What ``**settings`` are handed to is looked up in the bases of a class.
    """
    found: dict[str, inspect.Parameter] = {}
    takes_any = True
    bases: tuple[type, ...] = of.__mro__[:-1] if isinstance(of, type) else ()
    makers: list[Callable[..., Any]] = [base for base in bases if "__init__" in vars(base)]
    for place, maker in enumerate(makers or [of]):
        parameters = _parameters(maker)
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                if place and parameter.default is parameter.empty:
                    parameter = parameter.replace(default=None)  # the class gives it itself
                found.setdefault(parameter.name, parameter)
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        if not takes_any:
            break
    return found, takes_any


def fits_class(made: type, annotation: Any) -> bool:
    """Whether an object of the class ``made`` may stand where ``annotation`` is."""
    kinds = [kind for kind in _alternatives(annotation) if kind is not type(None)]
    if any(not isinstance(kind, type) or getattr(kind, "_is_protocol", False) for kind in kinds):
        return True
    return not kinds or issubclass(made, tuple(kinds))


def _with_tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_with_tuples, value))
    return value


def _parameters(maker: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a class or function, their annotations evaluated where that can be."""
    of = maker.__init__ if isinstance(maker, type) and not is_dataclass(maker) else maker  # type: ignore[misc]
    try:
        kinds = get_type_hints(of, include_extras=True)
    except (NameError, TypeError, AttributeError):  # names that are there for type checkers alone
        kinds = {}
    try:
        parameters = inspect.signature(maker).parameters.values()
    except ValueError:  # some of what is written in C
        return [inspect.Parameter("any", inspect.Parameter.VAR_KEYWORD)]
    return [each.replace(annotation=kinds.get(each.name, Any)) for each in parameters]


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation, config=_STRICT)


def _alternatives(annotation: Any) -> list[Any]:
    """The parts of a union, in their order; other annotations stand alone."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for union in get_args(annotation) for part in _alternatives(union)]
    return [annotation]


def _is_mapping(kind: Any) -> bool:
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Mapping) and len(get_args(kind)) == 2


def _settings_in(kind: Any) -> type | None:
    """A dataclass, or the class of ``Annotated[Mapping[str, Any], SomeSettings]``."""
    for each in (kind, *getattr(kind, "__metadata__", ())):
        if isinstance(each, type) and (each is not kind or is_dataclass(each)):
            return each
    return None


def _choices(kind: Any) -> tuple[Any, ...]:
    """What may be typed where a type is a choice of words."""
    return get_args(kind) if get_origin(kind) is Literal else ()


def _in_words(kind: Any) -> str:
    """A type with its bounds, e.g. ``a whole number of at least 1``."""
    if kind is type(None):
        return "null"
    if get_origin(kind) is Annotated:
        base, *bounds = get_args(kind)
        return f"{_in_words(base)} {_bounds_in_words(base, bounds)}".rstrip()
    if get_origin(kind) is Literal:
        return " or ".join(map(shown, get_args(kind)))
    plain = get_origin(kind) or kind
    if plain in _NAMES:
        return _NAMES[plain]
    if plain is Callable:
        return "a function: type ..._target_=my_package.my_function"
    if isinstance(plain, type) and issubclass(plain, Mapping):
        return "a mapping of keys to values"
    if isinstance(plain, type) and issubclass(plain, Sequence):
        return "a list"
    if is_dataclass(plain):
        return "a mapping of its settings"
    return f"a {getattr(plain, '__name__', plain)}"


def _bounds_in_words(base: type, bounds: Sequence[Any]) -> str:
    names = ("ge", "gt", "le", "lt")
    limits = {n: getattr(bound, n) for bound in bounds for n in names if hasattr(bound, n)}
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    if base is int and high in (None, MOST):
        return f"of at least {low}" if low else ">= 0"
    if low is None or high is None:
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        return " and ".join(f"{signs[name]} {value}" for name, value in limits.items())
    if "ge" in limits and "le" in limits:
        return f"from {low} to {high}"
    return f"in {'[' if 'ge' in limits else '('}{low}, {high}{']' if 'le' in limits else ')'}"


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a plain config; the number of an item stands for its key."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in items:
        where = f"{key}.{name}" if key else str(name)
        if isinstance(value, dict | list) and value:
            yield from leaves(value, where)
        else:
            yield where, value


def shown(value: Any) -> str:
    """A value as an error shows it."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plus(name: str, given: Mapping[str, Any]) -> str:
    """What Hydra wants before a key that the config lacks."""
    return "" if name in given else "+"
