"""Text that a model continues, or answers, as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from dbrx_train.checkpoint.weights import load_model, open_weights, tokenizer_of
from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.model.generation import generate
from dbrx_train.model.quantize import quantize

__all__ = ["NEW_TOKENS", "continue_text"]

NEW_TOKENS = 128


def continue_text(
    checkpoint: Path,
    prompt: str,
    *,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    seed: int,
    chat: bool,
    int8: bool,
    aside: Callable[[str], None],
) -> Iterator[str]:
    """Pieces of what the model in ``checkpoint`` writes after ``prompt``, each once its characters are whole.

    ``max_new_tokens``: by default ``NEW_TOKENS``, or what room the prompt leaves. ``chat``: the prompt is a
    user's turn, and the answer is what is written. ``int8``: hold the weights in 8 bits. ``aside`` hears of
    checkpoints that are passed over and of what 8 bits cost.

    Raises:
        ValueError: there are no weights, or not with a tokenizer that is known, or the options do not fit.
    """
    weights = open_weights(checkpoint, aside)
    tokenizer = tokenizer_of(weights)
    if tokenizer is None:
        raise ValueError(f"{checkpoint}: its tokenizer is not DBRX's, which is the one known here")
    model = load_model(weights).eval()
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    if chat:
        ids = tokenizer.chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
    if max(ids) >= model.config.vocab_size:
        raise ValueError(f"{checkpoint}: has {model.config.vocab_size} words, fewer than its tokenizer")
    room = model.config.max_seq_len - len(ids)
    if room < 1:
        raise ValueError(
            f"prompt: has {len(ids):,} tokens, and the model reads {model.config.max_seq_len:,}; must have "
            f"fewer, for there is no room to continue it"
        )
    input_ids = torch.tensor([ids])
    if int8:
        aside(f"int8: logits are off by {quantize(model, input_ids):.2%} (root mean square)")
    generator = torch.Generator().manual_seed(seed)
    tokens = generate(
        model,
        input_ids,
        min(NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_ids=tokenizer.stop_ids,
        generator=generator,
    )
    return _pieces(map(int, tokens), tokenizer)


def _pieces(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    shown, new_ids = "", list[int]()
    for token in tokens:
        if token in tokenizer.stop_ids:
            break
        new_ids.append(token)
        text = tokenizer.decode(new_ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character is still incomplete
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(new_ids)[len(shown) :]
