"""Model card of an export: what the model is, what it was trained on and under which licences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dbrx_train import __version__
from dbrx_train.checkpoint.lineage import Lineage
from dbrx_train.data.governance import Governance
from dbrx_train.model.config import DbrxConfig

__all__ = ["model_card"]


def model_card(model: DbrxConfig, lineage: Lineage) -> str:
    """The ``README.md`` of an exported folder, in the form that Hugging Face's hub reads."""
    return "\n".join([*_head(model, lineage), *_data(lineage), *_use()]) + "\n"


def _head(model: DbrxConfig, lineage: Lineage) -> Iterator[str]:
    yield from ("---", "library_name: transformers", "pipeline_tag: text-generation")
    yield from ("tags: [mixture-of-experts]", "---", "")
    yield f"# {lineage.run or 'Exported weights'}"
    yield ""
    yield (
        f"{model.num_params:,} parameters, {model.num_active_params:,} of them active for each token: "
        f"{model.n_layers} layers, {model.num_experts} experts of which {model.top_k} see a token."
    )
    seen = f" at step {lineage.step:,}, after {lineage.tokens:,} tokens" if lineage.run else ""
    yield f"Exported by dbrx-train {__version__}{seen}."
    yield ""


def _data(lineage: Lineage) -> Iterator[str]:
    yield from ("## Training data", "")
    for number, each in enumerate(lineage.ancestors()):
        if number:
            yield f"Begun from the weights of {f'run {each.run}' if each.run else each.path}:"
            yield ""
        if each.run is None:
            yield from ("What these weights were trained on is not known.", "")
            continue
        yield from _table(
            ("source", "tokens", "share", "licence", "owner", "terms", "allowed", "manifest"),
            (
                (
                    source.name,
                    f"{source.tokens:,}",
                    f"{source.tokens / max(1, each.tokens):.1%}",
                    *_said(Governance(**source.governance)),
                    f"`{source.manifest}`" if source.manifest else "not known",
                )
                for source in each.sources
            ),
        )
        names = [source.name for source in each.sources]
        yield from (f"The mix over run {each.run}, as weights:", "")
        yield from _table(
            ("from", *names, "how"),
            (
                (
                    str(point["at"]),
                    *(f"{point['weights'].get(name, 0):g}" for name in names),
                    point.get("interpolation", "step"),
                )
                for point in each.mix
            ),
        )


def _said(known: Governance) -> Sequence[str]:
    said = (known.licence, known.owner, known.terms, ", ".join(known.allowed))
    return [each or "not said" for each in said]


def _table(head: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in row)} |"
    yield ""


def _use() -> Iterator[str]:
    yield from ("## Use", "", "```python", "from transformers import AutoModelForCausalLM", "")
    yield from ('model = AutoModelForCausalLM.from_pretrained("FOLDER")', "```")
