"""The walk through docs/data.md, from texts to a registered model and back, line by line."""

from __future__ import annotations

import json
import re
import shlex
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from paths import ROOT
from warm import Warm

FASTER = {
    "max_duration=40ba": ["max_duration=2ba", "evaluation.max_samples=0", "data.num_workers=0"],
    "40": ["4"],
}


def write_texts(folder: Path) -> None:
    """A small part of what ``data quickstart`` would collect; it takes what is there."""
    folder.mkdir(parents=True)
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    texts = {
        "code": [(path.name, path.read_text(encoding="utf-8")[:6000]) for path in modules],
        "prose": [(f"pydoc topic {topic}", topics[topic][:6000]) for topic in sorted(topics)[:60]],
    }
    for name, found in texts.items():
        lines = [json.dumps({"text": text, "origin": origin}) for origin, text in found]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.slow
def test_the_walk_of_the_docs(tmp_path: Path, warm: Warm, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the extra explore")
    pytest.importorskip("fasttext", reason="the extra curate")
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", page.partition("## A walk")[2], flags=re.DOTALL)
    write_texts(tmp_path / "data/quickstart/text")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    said = []
    for line in block.splitlines():
        _, *arguments = shlex.split(line)
        arguments = [new for argument in arguments for new in FASTER.get(argument, [argument])]
        said.append(warm.torchrun(1, "-m", "dbrx_train", *arguments))
    *_, registered, generated, traced, seen = said
    assert "walk version 1, champion: run walk, step 2, " in registered
    assert "dbrx-train generate models:/walk@champion PROMPT" in registered
    assert generated.startswith("The standard library")
    for name in ("code", "prose"):
        prepared = re.findall(
            rf"^ +data/curated/{name}/\d+\.parquet: [\d,]+ bytes, xxh3 \w{{32}}$", traced, re.M
        )
        curated = rf"^ +{name} from data/quickstart/text/{name}\.jsonl: 1 raw file, [\d,]+ bytes, digest \w+$"
        assert len(prepared) == 1
        assert len(re.findall(curated, traced, re.M)) == 2, "of both sources, for duplicates go across them"
    assert traced.count("licence PSF-2.0") == 2
    tokens = dict(re.findall(r"^  (\w+): ([\d,]+) tokens by step 2", traced, re.M))
    assert sum(int(count.replace(",", "")) for count in tokens.values()) == 2 * 2 * 512
    assert f"runs/walk/checkpoints/ba2: run walk, {tokens['code']} tokens by step 2, as code" in seen
    assert "run walk (" in seen
    assert (tmp_path / "explore.html").stat().st_size > 100_000
