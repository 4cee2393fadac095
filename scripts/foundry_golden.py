"""Record what LLM Foundry 0.22 makes of in-context tasks: token ids, and outcomes of a model.

Run it in an environment of LLM Foundry's own:
`pip install llm-foundry==0.22.0 'tiktoken<0.9.1' 'transformers<4.52'`, with cl100k_base.tiktoken as
$TIKTOKEN_CACHE_DIR/9b5ad71b2ce5302211f9c61530b329a4922fc6a4. tests/evaluate/test_foundry.py holds ours
against the records.

    python scripts/foundry_golden.py tokens TASKS.yaml OUT.json [--max-seq-len N]
    python scripts/foundry_golden.py outcomes TASKS.yaml OUT.json --model HF_DIR [--max-seq-len N]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

EXAMPLES = 300
os.environ["HF_HUB_OFFLINE"] = "1"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("tokens", "outcomes"))
    parser.add_argument("tasks", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--max-seq-len", type=int, default=384)
    asked = parser.parse_args()
    tasks = yaml.safe_load(asked.tasks.read_text())["icl_tasks"]
    for task in tasks:
        task["dataset_uri"] = str((asked.tasks.parent / task["dataset_uri"]).resolve())
    out, model = asked.out.resolve(), asked.model and asked.model.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        kept: dict[str, Any] = {}
        whole = (
            tokens(tasks, asked.max_seq_len)
            if asked.what == "tokens"
            else outcomes(tasks, asked.max_seq_len, model)
        )
        for found in whole:
            kept |= found
            out.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def tokenizer() -> Any:
    build = importlib.import_module("llmfoundry.utils.builders").build_tokenizer
    return build("tiktoken", {"model_name": "gpt-4"})


def tokens(tasks: list[dict[str, Any]], max_seq_len: int) -> Iterator[dict[str, Any]]:
    """Task -> how many examples there are, and the hash of the token ids of the first ``EXAMPLES``."""
    build = importlib.import_module("llmfoundry.utils.builders").build_icl_evaluators
    made = tokenizer()
    for task in tasks:
        for evaluator in build([task], made, max_seq_len, 8)[0]:
            dataset = evaluator.dataloader.dataloader.dataset
            shots, prompt, rng = dataset.num_fewshot, dataset.prompt_string, dataset.fewshot_rng
            digest = hashlib.sha256()
            for i in range(min(EXAMPLES, len(dataset))):
                # As it would map the whole at the first access, with all of its padding
                example = dataset._prep_example(dataset.dataset[i], i, shots, prompt, rng)
                digest.update(json.dumps(example_of(dataset, example)).encode())
            print(evaluator.label, len(dataset), flush=True)
            yield {evaluator.label: {"examples": len(dataset), "sha256": digest.hexdigest()}}


def example_of(dataset: Any, example: dict[str, Any]) -> Any:
    """[[context ids, continuation ids], ...]; of an answer to generate [context ids, room for it]."""
    rows = example[dataset.context_key]
    if "continuation_indices" not in example:
        ids = rows.tolist()
        begin = next(i for i, token in enumerate(ids) if token != dataset.pad_tok_id)
        return [ids[begin:], dataset.base_batch["generation_kwargs"]["max_new_tokens"]]
    spans = example["continuation_indices"]
    if not isinstance(rows, list):
        rows, spans = [rows], [spans]
    return [
        [row[: span[0]].tolist(), row[span[0] : span[-1] + 1].tolist()]
        for row, span in zip(rows, spans, strict=True)
    ]


def outcomes(tasks: list[dict[str, Any]], max_seq_len: int, model: Path) -> Iterator[dict[str, list[Any]]]:
    """Task -> each example's result: 0 or 1, and the choice or what was written."""
    composer = importlib.import_module("composer")
    torch = importlib.import_module("torch")
    builders = importlib.import_module("llmfoundry.utils.builders")
    hugging_face = importlib.import_module("llmfoundry.models.hf").ComposerHFCausalLM
    made = tokenizer()
    evaluators, _ = builders.build_icl_evaluators(tasks, made, max_seq_len, 4)
    wrapped = hugging_face(
        made,
        pretrained_model_name_or_path=str(model),
        pretrained=True,
        init_device="cpu",
        use_flash_attention_2=False,
    )
    found: dict[str, list[Any]] = {}

    class Keep(composer.Callback):
        def eval_batch_end(self, state: Any, logger: Any) -> None:
            said = state.metric_outputs
            chosen = said.get("selected_choice_idx") or said.get("cleaned_output") or said["output"]
            plain = [each.tolist() if isinstance(each, torch.Tensor) else each for each in chosen]
            kept = [list(each) for each in zip(said["result"], plain, strict=True)]
            found.setdefault(state.dataloader_label, []).extend(kept)

    trainer = composer.Trainer(model=wrapped, callbacks=[Keep()], precision="fp32", progress_bar=False)
    trainer.eval(eval_dataloader=evaluators)
    yield found


if __name__ == "__main__":
    main()
