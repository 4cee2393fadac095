"""The documentation as a site: every page in it, links that lead somewhere, nothing from elsewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def test_every_page_is_in_the_navigation() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} | {"changes.md"}
    listed = [page for entry in SITE["nav"] for page in entry.values()]
    assert sorted(listed) == sorted(pages)
    assert len(re.findall(r"^\| \[", (ROOT / "docs/index.md").read_text("utf-8"), re.M)) == len(pages) - 2


def test_the_page_of_python_names_has_them_all() -> None:
    import dbrx_train

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: dbrx_train\.(\w+)$", page, re.M)) == sorted(dbrx_train.__all__)


def test_links_of_other_documents_lead_somewhere() -> None:
    for name in ("CHANGELOG.md", "RELEASING.md"):
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text(encoding="utf-8")):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{name} links to {target}"


def test_links_out_of_the_documents_lead_to_the_repository() -> None:
    from docs_site import REPOSITORY, relinked

    there = relinked("[a](../configs/x.yaml) [b](../CHANGELOG.md) [c](data.md#reading-it)")
    assert there == f"[a]({REPOSITORY}configs/x.yaml) [b](changes.md) [c](data.md#reading-it)"
    there = relinked("[a](docs/reliability.md#faults) [b](RELEASING.md) [c](https://d)", of_changes=True)
    assert there == f"[a](reliability.md#faults) [b]({REPOSITORY}RELEASING.md) [c](https://d)"


def test_what_only_github_understands_is_written_in_the_other_way() -> None:
    from docs_site import respelled

    page = "- a\n  b\n\n  | `x \\| y` |\n  |---|\n- c\n\n```\nd\n\n  e\n```"
    there = "- a\n  b\n\n    | `x | y` |\n    |---|\n\n- c\n\n```\nd\n\n  e\n```"
    assert "\n".join(respelled(page.split("\n"))) == there


@pytest.mark.slow
def test_the_site_is_built_and_asks_no_other_host_for_anything(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(SITE["nav"])
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=.?(?:https?:)?//", html), page
        styles = re.findall(r"<link\b[^>]*>", html)
        assert not [link for link in styles if re.search(r"href=.?(?:https?:)?//", link)], page
