"""A run's YAML, read and written."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dbrx_train.config.epochs import in_samples
from dbrx_train.config.errors import ConfigError, require, where_and_what
from dbrx_train.config.inherited import with_model
from dbrx_train.config.run import RunConfig
from dbrx_train.errors import first_line, seen_from
from dbrx_train.kinds import unknown_keys, wrong_kinds
from dbrx_train.options import check
from dbrx_train.redact import mask_tree

__all__ = ["RECORD", "flatten", "for_record", "from_dict", "load", "to_dict", "to_yaml"]


_A_RUN = "a run is a mapping of keys, such as run_name and model"


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, apply ``key=value`` overrides, and check the whole.

    ``variables:`` holds values for interpolation (``${variables.d_model}``) and is not part of the result.

    Raises:
        ConfigError: anything is wrong with it; one line that names the file or the key.
    """
    given = _read_yaml(Path(path))
    for override in overrides:
        given = _override(given, override)
    try:
        resolved = OmegaConf.to_container(given, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {first_line(error)}") from None
    assert isinstance(resolved, dict)
    resolved.pop("variables", None)
    for trouble in (*unknown_keys(resolved, RunConfig), *wrong_kinds(resolved, RunConfig)):
        raise ConfigError(f"{path}: {trouble}")
    try:
        config = from_dict(with_model(resolved))
        config.max_duration = in_samples(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:  # DbrxConfig checks itself when it is made
        raise ConfigError(f"{path}: model.{first_line(error)}") from None
    try:
        check(config)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def from_dict(values: Mapping[Any, Any]) -> RunConfig:
    """A run from the plain values of one that was checked when it was read, such as ``to_dict`` gives."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), dict(values)))
    assert isinstance(config, RunConfig)
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The whole run as plain dicts, lists and scalars, defaults included."""
    return dataclasses.asdict(config)


def for_record(config: RunConfig) -> dict[str, Any]:
    """The same with secrets masked, for all that is kept."""
    masked: dict[str, Any] = mask_tree(to_dict(config))
    return masked


RECORD = "# What a run was, with every default; written by dbrx-train at each start.\n"
"""The first line of a run's config.yaml."""


def to_yaml(config: RunConfig) -> str:
    """The whole run as YAML that ``load`` reads back, secrets masked."""
    return RECORD + OmegaConf.to_yaml(OmegaConf.create(for_record(config)))


def flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``{"a": {"b": 1}}`` -> ``("a.b", 1)``; lists stay whole."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _read_yaml(path: Path) -> DictConfig:
    try:
        given = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{seen_from(path)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        if error.errno is None:  # OmegaConf's, of a single number
            raise ConfigError(f"{path}: {_A_RUN}") from None
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        line, problem = where_and_what(error)
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}") from None
    if not isinstance(given, DictConfig):
        raise ConfigError(f"{path}: {_A_RUN}")
    if not given:
        raise ConfigError(f"{path}: is empty; {_A_RUN}")
    plain = OmegaConf.to_container(given)
    assert isinstance(plain, dict)
    if list(plain.values()) == [None]:  # what OmegaConf makes of a single word
        raise ConfigError(f"{path}: {_A_RUN}")
    return given


def _override(given: DictConfig, override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    require(
        bool(equals) and all(part.strip() for part in key.split(".")),
        f"{override!r}: an override has the form key=value",
    )
    try:
        changes = OmegaConf.from_dotlist([override])
        try:
            merged = OmegaConf.merge(given, changes)
        except TypeError:  # a list in place of a mapping, or the other way round
            merged = copy.deepcopy(given)
            OmegaConf.update(merged, key, OmegaConf.select(changes, key), merge=False, force_add=True)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"{override!r}: {first_line(error)}") from None
    assert isinstance(merged, DictConfig)
    return merged
