"""How a document's text is made from a row's fields: one of them, or several in a template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

__all__ = ["TextTemplate", "text_template", "value_of"]

_ESCAPE = re.compile(r"\\([nt\\])")
_ESCAPED = {"n": "\n", "t": "\t", "\\": "\\"}
_EXAMPLE = "it is like '{title}\\n\\n{body}', with {{ and }} for braces"


@dataclass(frozen=True)
class TextTemplate:
    """Fields with what stands before each and after the last; ``a.b`` is field b of field a."""

    fields: tuple[str, ...]
    between: tuple[str, ...]
    """One more than ``fields``."""
    option: str
    """What chooses the fields, for errors."""

    @property
    def is_plain(self) -> bool:
        """Whether the text is that of one field."""
        return self.between == ("", "")

    def fill(self, texts: Sequence[str]) -> str:
        """The text of a row whose fields hold ``texts``; empty if they are blank."""
        return texts[0] if self.is_plain else "".join(self.chunks([[text] for text in texts]))

    def chunks(self, texts: Sequence[Iterable[str]]) -> Iterator[str]:
        """The same of fields whose texts come in pieces."""
        if self.is_plain:
            yield from texts[0]
            return
        held: list[str] | None = [self.between[0]]  # until there is more than blanks
        for text, after in zip(texts, self.between[1:], strict=True):
            for chunk in text:
                if held is None:
                    yield chunk
                elif chunk.strip():
                    yield "".join([*held, chunk])
                    held = None
                else:
                    held.append(chunk)
            if held is None:
                yield after
            else:
                held.append(after)


def text_template(text_field: str, template: str | None) -> TextTemplate:
    """That of one field, or of ``template``: names in braces; ``\\n``, ``\\t`` and ``\\\\`` as in a string.

    Raises:
        ValueError: the template is none, or is given beside a field other than ``text``.
    """
    if template is None:
        return TextTemplate((text_field,), ("", ""), "--text-field")
    if text_field != "text":
        raise ValueError("--template: given beside --text-field; give one of the two")
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"--template: {template!r} is not well formed ({error}); {_EXAMPLE}") from None
    fields, between = list[str](), [""]
    for literal, name, spec, conversion in parsed:
        between[-1] += _ESCAPE.sub(lambda match: _ESCAPED[match[1]], literal)
        if name is not None:
            if not name or spec or conversion:
                raise ValueError(f"--template: {template!r} holds braces without a plain name; {_EXAMPLE}")
            fields.append(name)
            between.append("")
    if not fields:
        raise ValueError(f"--template: {template!r} names no field; {_EXAMPLE}")
    return TextTemplate(tuple(fields), tuple(between), "--template")


def value_of(row: Mapping[str, Any], field: str) -> Any:
    """The field's value: of that very name, or nested; None below a null. KeyError if there is none."""
    if field in row:
        return row[field]
    value: Any = row
    for name in field.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise KeyError(field)
        value = value[name]
    return value
