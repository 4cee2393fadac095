"""Text that a model continues, or answers, as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from dbrx_train.checkpoint.weights import Weights, load_model, open_weights, tokenizer_of
from dbrx_train.data.tokenizer import Tokenizer
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.generation import generate
from dbrx_train.model.quantize import quantize

__all__ = ["NEW_TOKENS", "check_words", "continue_text", "load_speaker", "pieces"]

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
    model, tokenizer = load_speaker(open_weights(checkpoint, aside))
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    if chat:
        ids = tokenizer.chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
    check_words(model, ids, checkpoint)
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
    return pieces(map(int, tokens), tokenizer)


def load_speaker(weights: Weights) -> tuple[Dbrx, Tokenizer]:
    """The model of weights, to write text with, and its tokenizer; ValueError if that is not known."""
    tokenizer = tokenizer_of(weights)
    if tokenizer is None:
        raise ValueError(f"{weights.path}: its tokenizer is not DBRX's, which is the one known here")
    return load_model(weights).eval(), tokenizer


def check_words(model: Dbrx, ids: Sequence[int], checkpoint: Path) -> None:
    """Raise ValueError if the model has no row for an id."""
    if max(ids) >= model.config.vocab_size:
        raise ValueError(f"{checkpoint}: has {model.config.vocab_size} words, fewer than its tokenizer")


def pieces(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """What tokens say up to a stop, each piece once its characters are whole."""
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
