"""What HTML pages share: their look, and how one is made of a template in one piece, with no network."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

__all__ = ["render"]


def render(package: str, data: Any, **values: Any) -> str:
    """The page of ``package``: its ``page.html``, with ``style``, ``script`` and ``data`` inside.

    Args:
        package: whose folder has ``page.html``, ``page.js`` and, if it wants more than all pages have,
            ``page.css``.
        data: for the script, as JSON.
        values: for the template.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    shared, folder = files(__name__), files(package)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    style, script = (
        "\n".join(
            each.read_text(encoding="utf-8") for each in (shared / name, folder / name) if each.is_file()
        )
        for name in ("page.css", "page.js")
    )
    return template.render(
        **values,
        style=Markup(style),
        script=Markup(script),
        data=Markup(json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")),
    )
