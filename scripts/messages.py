"""Write the lists in docs/troubleshooting.md: python scripts/messages.py

Every refusal and warning is collected from the code that makes it, as it is printed but for what is put in;
every moment of interruption from the table that tests drive.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dbrx_train"

_REFUSALS = {"ValueError", "ConfigError", "Stopped", "LeaseLost", "MixError"}


def messages() -> Iterator[tuple[str, str, str]]:
    """(file, "refused" or "warned", message) of each, files in order."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            found = _message(node)
            if found is not None:
                yield path.relative_to(PACKAGE).as_posix(), *found


def _message(node: ast.AST) -> tuple[str, str] | None:
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        call, kind = node.exc, "refused"
        if _name(call.func) not in _REFUSALS or not call.args:
            return None
        text = call.args[0]
    elif isinstance(node, ast.Call) and _name(node.func) == "require":
        text, kind = node.args[1], "refused"
    elif isinstance(node, ast.Call) and _name(node.func) == "warn" and node.args:
        text, kind = node.args[0], "warned"
    else:
        return None
    shown = _text(text)
    return None if shown is None else (kind, shown)


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _text(node: ast.expr) -> str | None:
    """What it says, with a name in braces for what is put in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(filter(None, (_text(part) for part in node.values)))
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    return None


if __name__ == "__main__":
    for file, kind, text in messages():
        print(f"{file}: {kind}: {text}")
