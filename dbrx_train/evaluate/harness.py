"""A model of EleutherAI's lm-evaluation-harness, ``dbrx_train``: its tasks on weights as they lie here.

lm-eval knows the models that are registered with it: ``dbrx-train lm-eval`` is its command with this one
among them, and any program that imports this module has it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  (registers all others: lm-eval does so only while it has none)
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dbrx_train.checkpoint.weights import load_model, open_weights, tokenizer_of
from dbrx_train.errors import aside
from dbrx_train.evaluate.answers import stopper
from dbrx_train.evaluate.scoring import Pair, Score, batches, rows_of, score
from dbrx_train.evaluate.writing import written
from dbrx_train.model.continuous_batching import Request

__all__ = ["DbrxLM", "main"]


@register_model("dbrx_train")
class DbrxLM(TemplateLM):  # type: ignore[misc]
    """A run, a checkpoint or a Hugging Face folder, scored and continued without padding to a length.

    Args:
        path: of the weights.
        dtype: of the weights in memory; default: as they are stored.
        max_length: tokens that it reads at most; default: the model's ``max_seq_len``.
        batch_tokens: of a forward pass at most. lm-eval's ``batch_size`` is not used.
    """

    def __init__(
        self,
        path: str,
        dtype: str | None = None,
        max_length: int | str | None = None,
        batch_tokens: int | str = 4096,
        device: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        opened = open_weights(Path(path), aside)
        tokenizer = tokenizer_of(opened)
        if tokenizer is None:
            raise ValueError(f"{path}: its tokenizer is not DBRX's, which is the one known here")
        self.words, self.batch_tokens = tokenizer, int(batch_tokens)
        self.max_length = int(max_length or opened.model.max_seq_len)
        if not 1 < self.max_length <= opened.model.max_seq_len:
            raise ValueError(f"max_length: must be at most the model's {opened.model.max_seq_len}")
        model = load_model(opened).eval()
        if dtype is not None:
            if dtype not in ("float32", "bfloat16"):
                raise ValueError(f"dtype: must be float32 or bfloat16, not {dtype}")
            model = model.to(getattr(torch, dtype))
        # lm-eval's command asks for cuda:0 whatever there is.
        self.where = torch.device((device or "cuda") if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.where)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token, which also stands ahead of a text without context."""
        return self.words.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """A text as ids; DBRX adds no special tokens."""
        return self.words.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is the likeliest."""
        found: list[tuple[float, bool] | None] = [None] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="dbrx_train: scores") as bar:
            for number, each in self._scores([self._fitting(context, end) for _, context, end in requests]):
                key, _, end = requests[number]
                found[number] = each.log_prob, each.greedy == tuple(end)
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, found[number])
                bar.update()
        return [each or (0.0, True) for each in found]  # an empty continuation is certain

    def _fitting(self, context: list[int], continuation: list[int]) -> Pair:
        """The end of the two, of which the last token is only predicted."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"max_length: a continuation of {len(continuation)} tokens does not fit {self.max_length}"
            )
        return context[len(continuation) - self.max_length - 1 :], continuation

    def _scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        """The score of each pair, by its number; neighbours after the same context are read together."""
        asked = [i for i, (_, continuation) in enumerate(pairs) if continuation]
        rows = []
        for _, same in groupby(range(len(asked)), key=lambda place: pairs[asked[place]][0]):
            places = list(same)
            rows += rows_of(places[0], [pairs[asked[place]] for place in places])
        for batch in batches(rows, self.batch_tokens):
            for (first, offset), each in score(self.model, batch, self.where):
                yield asked[first + offset], each

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows of ``max_length`` that do not overlap."""
        owners, windows = list[int](), list[tuple[None, list[int], list[int]]]()
        for number, (text,) in enumerate(request.args for request in requests):
            for pair in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                owners.append(number)
                windows.append((None, *make_disjoint_window(pair)))
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (log_prob, _) in zip(owners, scores, strict=True):
            sums[owner] += log_prob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to its stops; sampled with the request's number as seed."""
        stops, asked = list[list[str]](), list[tuple[int, Request]]()
        for number, (context, options) in enumerate(request.args for request in requests):
            given = normalize_gen_kwargs(options, 256)
            stops.append(handle_stop_sequences(given["until"], eos=self.words.decode([self.eot_token_id])))
            new = given["max_gen_toks"]
            if new >= self.max_length:
                raise ValueError(f"max_gen_toks: must be below max_length {self.max_length}, not {new}")
            prompt = self.tok_encode(context)[new - self.max_length :] or [self.eot_token_id]
            heat = float(given["temperature"]) if given.get("do_sample") else 0.0
            done = stopper([text for text in stops[-1] if text], self.words)
            share = float(given.get("top_p", 1.0))
            asked.append((number, Request(prompt, new, heat, share, number, self.words.stop_ids, done)))
        texts = [""] * len(requests)
        asked.sort(key=lambda each: -len(each[1].prompt))
        answers = written(self.model, asked, self.batch_tokens)
        for number, ids in tqdm(answers, total=len(asked), disable=disable_tqdm, desc="dbrx_train: answers"):
            text = self.words.decode(ids[:-1] if ids[-1] in self.words.stop_ids else ids)
            texts[number] = postprocess_generated_text(text, stops[number], None)
            self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return texts


def main(arguments: Iterable[str]) -> None:
    """lm-eval's own command, with ``--model dbrx_train`` among its models and as the default."""
    from lm_eval.__main__ import cli_evaluate

    given = list(arguments)
    if not any(each in ("--model", "-M") or each.startswith("--model=") for each in given):
        given = ["--model", "dbrx_train", *given]
    sys.argv = ["lm_eval", *given]
    cli_evaluate()
