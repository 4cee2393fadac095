"""A recipe: which sources there are, and which steps they go through, read from YAML."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dbrx_train.data.curate.step import CorpusStep, Step
from dbrx_train.data.curate.steps import STEPS
from dbrx_train.data.prepare.text_template import TextTemplate, text_template
from dbrx_train.errors import first_line, nearest, seen_from, where_and_what
from dbrx_train.files import seal
from dbrx_train.kinds import unknown_keys, wrong_kinds
from dbrx_train.options import check, option

__all__ = ["Recipe", "Source", "load_recipe"]


@dataclass
class Source:
    """Documents under one name: they stay together, in ``OUT/NAME``."""

    paths: list[str] = option("names files, folders or globs, as `data prepare` takes them.")
    text_field: str = option("Field or column that holds the text.", "text")
    template: str | None = option("Text made of several fields instead, as '{title}\\n\\n{body}'.", None)
    suffixes: list[str] = option("Endings of text files.", lambda: [".txt", ".md", ".py"])
    id_field: str | None = option("Field that holds a document's id; null: where it was read.", None)
    keep: list[str] = option("Further fields to keep, as columns metadata.FIELD.", list)

    @property
    def text(self) -> TextTemplate:
        """How a row's text is made."""
        return text_template(self.text_field, self.template)


@dataclass(frozen=True)
class Recipe:
    """Sources by name, and steps in order."""

    path: str
    sources: dict[str, Source]
    steps: tuple[Step, ...]

    def steps_of(self, source: str) -> tuple[Step, ...]:
        """The steps that a source's documents go through."""
        return tuple(step for step in self.steps if step.looks_at(source))

    def values(self) -> dict[str, Any]:
        """The whole recipe with every default, as plain values; the order of sources and steps counts."""
        return {
            "sources": [{name: asdict(source)} for name, source in self.sources.items()],
            "steps": [{step.name: asdict(step)} for step in self.steps],
        }

    @property
    def digest(self) -> str:
        """XXH3-128 of :meth:`values`."""
        return seal(self.values())


def load_recipe(path: str) -> Recipe:
    """Read a recipe.

    Raises:
        ValueError: one line that names the file and the key, and what would be right.
    """
    given = _read(path)
    try:
        return _recipe(path, given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read(path: str) -> dict[Any, Any]:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file{seen_from(path)}; it must be a recipe")
    try:
        given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        line, what = where_and_what(error)
        raise ValueError(f"{path}{line}: not valid YAML ({what})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({first_line(error)})") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path}: a recipe is a mapping with the keys sources and steps")
    return given


def _recipe(path: str, given: dict[Any, Any]) -> Recipe:
    for key in given:
        if key not in ("sources", "steps"):
            raise ValueError(f"unknown key {key}{nearest(str(key), ('sources', 'steps'))}")
    named, listed = given.get("sources"), given.get("steps") or []
    if not isinstance(named, dict) or not named:
        raise ValueError("sources: must be a mapping of names, each to a mapping with paths")
    if not isinstance(listed, list):
        raise ValueError("steps: must be a list of names, or of a name with options")
    sources = {}
    for name, values in named.items():
        if not isinstance(name, str) or not name or name.startswith(".") or "/" in name:
            raise ValueError(f"sources: {name!r} is no name for a folder")
        sources[name] = _made(Source, values, f"sources.{name}")
        sources[name].text  # noqa: B018  refuses a template that is none
    steps = tuple(_step(item, number, sources) for number, item in enumerate(listed))
    recipe = Recipe(path, sources, steps)
    _check_order(recipe)
    return recipe


def _step(item: Any, number: int, sources: dict[str, Source]) -> Step:
    if isinstance(item, dict) and len(item) == 1:
        ((name, values),) = item.items()
    elif isinstance(item, str):
        name, values = item, {}
    else:
        raise ValueError(f"steps[{number}]: must be a step's name, or one name with its options")
    if name not in STEPS:
        raise ValueError(f"steps[{number}]: no step {name}{nearest(str(name), STEPS)}")
    step: Step = _made(STEPS[name], {} if values is None else values, f"steps[{number}].{name}")
    for source in step.sources or ():
        if source not in sources:
            raise ValueError(f"steps[{number}].{name}.sources: no source {source}{nearest(source, sources)}")
    return step


def _made(kind: Any, values: Any, key: str) -> Any:
    """The dataclass with these values, once they are known to be right."""
    if not isinstance(values, dict):
        names = ", ".join(field.name for field in dataclasses.fields(kind)[:4])
        raise ValueError(f"{key}: must be a mapping with {names}")
    for trouble in (*unknown_keys(values, kind, f"{key}."), *wrong_kinds(values, kind, key)):
        raise ValueError(trouble)
    made = kind(**values)
    try:
        check(made)
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from None
    return made


def _check_order(recipe: Recipe) -> None:
    for source in recipe.sources:
        seen, corpus = set[str](), ""
        for step in recipe.steps_of(source):
            if step.name in seen:
                raise ValueError(
                    f"steps: {step.name} is named twice for source {source}; "
                    f"once is enough, or give each other sources"
                )
            seen.add(step.name)
            for field in step.fields():
                if field not in recipe.sources[source].keep:
                    raise ValueError(
                        f"sources.{source}.keep: must name {field!r}, by which {step.name} goes, too"
                    )
            if isinstance(step, CorpusStep):
                corpus = step.name
            elif corpus:
                raise ValueError(
                    f"steps: {step.name} comes after {corpus}; what looks at all documents together "
                    f"comes last, so that no duplicate is removed for one that a later rule removes"
                )
