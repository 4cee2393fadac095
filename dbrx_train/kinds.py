"""The keys of a YAML file and the kinds of their values, held against the dataclasses before these are made.

OmegaConf would refuse them, too, but in terms of its own classes, and of one in three without the key.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

from omegaconf import BooleanNode, FloatNode, IntegerNode, StringNode
from omegaconf.errors import ValidationError

from dbrx_train.errors import nearest

__all__ = ["unknown_keys", "wrong_kinds"]

_SCALARS: dict[Any, tuple[Any, str]] = {
    bool: (BooleanNode, "true or false"),
    int: (IntegerNode, "a whole number"),
    float: (FloatNode, "a number"),
    str: (StringNode, "text"),
}
_MISSING = "???"
_LONGEST_VALUE = 60


def unknown_keys(given: dict[Any, Any], schema: Any, prefix: str = "") -> Iterator[str]:
    """A line for each key of ``given`` that ``schema`` lacks, with the nearest one that it has."""
    kinds = typing.get_type_hints(schema)
    for key, value in given.items():
        if key not in kinds:
            places = [] if prefix else [*_places_of(str(key), schema)]
            meant = f"; did you mean {' or '.join(places)}?" if places else nearest(str(key), kinds)
            yield f"unknown key {prefix}{key}{meant}"
            continue
        for name, inner, kind in _inside(value, kinds[key]):
            if dataclasses.is_dataclass(kind) and isinstance(inner, dict):
                yield from unknown_keys(inner, kind, f"{prefix}{key}{name}.")


def _places_of(name: str, schema: Any, prefix: str = "") -> Iterator[str]:
    """Where options of this name stand, in sections of sections."""
    for field, kind in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            yield from _places_of(name, kind, f"{prefix}{field}.")
        elif field == name:
            yield f"{prefix}{field}"


def wrong_kinds(given: Any, kind: Any, key: str = "", doc: str = "") -> Iterator[str]:
    """A line for each value in ``given`` that is not of its ``kind``, or is missing."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if given is None and type(None) in options:
        return
    (kind, *others) = (each for each in options if each is not type(None))
    if not _is_a(given, kind) and not any(_is_a(given, each) for each in others):
        yield _refusal(given, (kind, *others), key, null=type(None) in options)
    elif dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            name = f"{key}.{field.name}" if key else field.name
            value = given.get(field.name, _MISSING)
            if value != _MISSING:
                yield from wrong_kinds(value, hints[field.name], name, field.metadata.get("doc", ""))
            elif field.default is field.default_factory is dataclasses.MISSING:
                yield f"{name}: is missing; it {_says(field.metadata['doc'])}"
    else:
        for name, inner, of in _inside(given, kind):
            yield from wrong_kinds(inner, of, f"{key}{name}", doc)


def _inside(value: Any, kind: Any) -> Iterator[tuple[str, Any, Any]]:
    """The values in one that there are, with what their keys add, and their kind."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is dict and isinstance(value, dict):
        yield from ((f".{name}", item, arguments[1]) for name, item in value.items())
    elif origin is list and isinstance(value, list):
        yield from ((f"[{i}]", item, arguments[0]) for i, item in enumerate(value))
    elif dataclasses.is_dataclass(kind):
        yield "", value, kind


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind, whatever is in it."""
    if kind not in _SCALARS:
        wanted = list if typing.get_origin(kind) is list else dict
        return isinstance(value, wanted)
    if value is None or isinstance(value, list | dict):
        return False
    try:
        _SCALARS[kind][0](value)
    except ValidationError:
        return False
    return True


def _refusal(value: Any, kinds: tuple[Any, ...], key: str, null: bool) -> str:
    wanted = " or ".join([*map(_words, kinds), *(["null"] if null else [])])
    shown = "null" if value is None else repr(value)
    shown = shown if len(shown) <= _LONGEST_VALUE else f"{shown[:_LONGEST_VALUE]}…"
    return f"{key}: must be {wanted}, not {shown}{_as_mapping(value, kinds)}"


def _as_mapping(value: Any, kinds: tuple[Any, ...]) -> str:
    """How to write what was given as text, and is meant as the first key of a mapping."""
    for kind in filter(dataclasses.is_dataclass, kinds):
        first = dataclasses.fields(kind)[0].name
        if isinstance(value, str) and typing.get_type_hints(kind)[first] is str:
            return f"; write {{{first}: {value}}}"
    return ""


def _words(kind: Any) -> str:
    if kind in _SCALARS:
        return _SCALARS[kind][1]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return f"a list, each {_words(arguments[0])}"
    if origin is dict:
        return f"a mapping of names, each to {_words(arguments[1])}"
    return f"a mapping with {', '.join(field.name for field in dataclasses.fields(kind)[:3])}"


def _says(doc: str) -> str:
    return doc if doc.startswith("names") else f"says {doc}"
