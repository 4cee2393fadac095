"""What mkdocs.yml adds to MkDocs, so that the same pages read well on GitHub and on the site.

CHANGELOG.md becomes a page, links that leave docs lead to the repository, and what only GitHub's Markdown
understands is put in the way of Python's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = "https://github.com/dbrx-train/dbrx-train/blob/main/"
CHANGES = Path(__file__).parent.parent / "CHANGELOG.md"


def on_files(files: Any, *, config: Any) -> Any:
    """Give CHANGELOG.md a page, as if it lay in docs."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "changes.md", abs_src_path=str(CHANGES)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    lines = relinked(markdown, of_changes=page.file.src_uri == "changes.md").split("\n")
    return "\n".join(respelled(lines))


def relinked(markdown: str, of_changes: bool = False) -> str:
    """What leads out of docs leads to the repository, or to the page of the changes.

    CHANGELOG.md lies above docs, so its own links begin there.
    """
    if of_changes:
        markdown = re.sub(r"\]\((?!docs/|https?:|#)", f"]({REPOSITORY}", markdown)
        return markdown.replace("](docs/", "](")
    markdown = markdown.replace("](../CHANGELOG.md", "](changes.md")
    return markdown.replace("](../", f"]({REPOSITORY}")


def respelled(lines: list[str]) -> Iterator[str]:
    """Tables and paragraphs within a list want four spaces, and a blank line after them.

    A pipe in a table's code wants no backslash.
    """
    fenced = within = False
    before = ""
    for line in lines:
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            was, within = within, line.startswith("  ") and (within or not before)
            if was and not within and line:
                yield ""
            before = line
            if line.lstrip().startswith("|"):
                line = re.sub(r"`[^`]+`", lambda code: code[0].replace(r"\|", "|"), line)
            if within:
                line = f"  {line}"
        yield line
