"""The tokenizer as transformers loads it, without code of ours: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from dbrx_train.data.fast_tokenizer import FastTokenizer
from dbrx_train.data.tokenizer import TiktokenTokenizer, Tokenizer

__all__ = ["write_tokenizer"]

# Splits as tiktoken does, without possessive quantifiers, which mean something else in Oniguruma.
_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ChatML: turns joined by a newline, as Tokenizer.chat lays them out.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '' if loop.first else '\n' }}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> list[str]:
    """Write the files of ``tokenizer`` and return their names; max_length: of the model, in tokens.

    Ids are those of ``tokenizer``, but text that spells a special token becomes that token, as is usual
    in transformers.
    """
    names = {id_: text for text, id_ in tokenizer.special.items()}
    eos = names[tokenizer.eos_id]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "unk_token": eos,
        "pad_token": names[tokenizer.pad_id],
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": _json_of(tokenizer),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return list(files)


@lru_cache(maxsize=1)
def _json_of(tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer, FastTokenizer):
        return tokenizer.json
    assert isinstance(tokenizer, TiktokenTokenizer)
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [
        (spell(left), spell(right))
        for token in sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
        for left, right in _merge_of(tokenizer.ranks, token)
    ]
    vocabulary = {spell(token): rank for token, rank in tokenizer.ranks.items()} | dict(tokenizer.special)
    # No piece of a text is one of these whole, so they are never met, but ids without a hole are expected.
    unused = set(range(tokenizer.vocab_size)) - set(vocabulary.values())
    vocabulary |= {tokenizer.decode([id_]): id_ for id_ in unused}
    fast = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, fuse_unk=False, byte_fallback=False, ignore_merges=True)
    )
    split = pre_tokenizers.Split(Regex(_PATTERN), "isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in tokenizer.special])
    content = json.loads(fast.to_str())
    content["model"]["merges"] = [" ".join(merge) for merge in merges]  # the form before tokenizers 0.20
    return json.dumps(content, ensure_ascii=False)


def _merge_of(ranks: Mapping[bytes, int], token: bytes) -> list[tuple[bytes, bytes]]:
    """The last merge that makes ``token``, by which alone tiktoken's ranks can reach it; none for a byte.

    What is merged before is decided by lower ranks, the same wherever the token's bytes stand.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        lowest = min(pairs)
        if lowest >= ranks[token]:
            return []  # only met as a whole word, which needs no merge
        i = pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [(parts[0], parts[1])] if len(parts) == 2 else []


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level BPE, from GPT-2 on."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
