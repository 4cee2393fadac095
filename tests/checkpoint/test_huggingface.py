"""Weights of transformers' models in, and out again, without a bit's difference; what is damaged is named."""

from __future__ import annotations

import base64
import errno
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import HELPERS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from warm import Warm

from dbrx_train import Dbrx, DbrxConfig, cli
from dbrx_train.checkpoint import folder as folders
from dbrx_train.checkpoint import huggingface
from dbrx_train.checkpoint.huggingface import MANIFEST, export, import_folder
from dbrx_train.checkpoint.tensors import model_tensors, write
from dbrx_train.checkpoint.verify import verify
from dbrx_train.checkpoint.weights import consolidate, load_model, open_weights, read_together, upcycled
from dbrx_train.data.tokenizer import load_tokenizer
from dbrx_train.model.hf.files import open_tensors
from dbrx_train.model.hf.names import table

transformers = pytest.importorskip("transformers")


def dbrx(d: int, heads: int, kv: int, ffn: int, experts: int, top_k: int, **more: Any) -> Any:
    return transformers.DbrxConfig(
        d_model=d,
        n_heads=heads,
        n_layers=2,
        vocab_size=131,
        max_seq_len=64,
        attn_config={"kv_n_heads": kv, "rope_theta": 5e5, "clip_qkv": more.pop("clip", 8.0)},
        ffn_config={"ffn_hidden_size": ffn, "moe_num_experts": experts, "moe_top_k": top_k, **more},
    )


def mixtral(d: int, heads: int, kv: int, ffn: int, experts: int, top_k: int, **more: Any) -> Any:
    return transformers.MixtralConfig(
        hidden_size=d,
        num_attention_heads=heads,
        num_hidden_layers=2,
        vocab_size=131,
        max_position_embeddings=64,
        num_key_value_heads=kv,
        intermediate_size=ffn,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        **more,
    )


MODELS: dict[str, Callable[[], Any]] = {
    "dbrx": lambda: dbrx(48, 6, 3, 20, 4, 3),
    "dbrx-no-clip-p2": lambda: dbrx(56, 7, 7, 13, 5, 2, clip=None, moe_normalize_expert_weights=2.0),
    "dbrx-one-kv-head-not-normalised": lambda: dbrx(30, 5, 1, 33, 3, 1, moe_normalize_expert_weights=None),
    "mixtral": lambda: mixtral(64, 8, 2, 28, 8, 2),
    "mixtral-odd": lambda: mixtral(36, 6, 3, 17, 5, 3, rms_norm_eps=1e-3, rope_theta=777.0),
}


def make(name: str, seed: int = 0) -> nn.Module:
    config = MODELS[name]()
    kind = transformers.DbrxForCausalLM if name.startswith("dbrx") else transformers.MixtralForCausalLM
    torch.manual_seed(seed)
    model: nn.Module = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0, 0.15)
    return model


def tokens() -> Tensor:
    return torch.randint(131, (3, 29), generator=torch.Generator().manual_seed(1))


def nobody(line: str) -> None:
    raise AssertionError(line)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    found = other.state_dict()
    assert one.state_dict().keys() == found.keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, found[name]), name


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


FORMS: dict[str, dict[str, Any]] = {
    "one file": {},
    "shards": {"max_shard_size": "40KB"},
    "bin": {"safe_serialization": False},
    "bin shards": {"safe_serialization": False, "max_shard_size": "40KB"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_in_and_out_is_the_same_model(name: str, form: str, tmp_path: Path) -> None:
    theirs = make(name)
    theirs.save_pretrained(tmp_path / "theirs", **FORMS[form])
    assert len([*(tmp_path / "theirs").glob("*.index.json")]) == form.endswith("shards")
    ours = load_model(open_weights(tmp_path / "theirs", nobody))
    with torch.no_grad():
        logits = theirs(tokens()).logits
        assert apart(ours.eval()(tokens()).logits, logits) < 1e-5
    import_folder(tmp_path / "theirs", tmp_path / "ours", max_shard_bytes=30_000)
    assert_same(ours, load_model(open_weights(tmp_path / "ours", nobody)))
    export(tmp_path / "ours", tmp_path / "out", torch.float32, nobody, max_shard_bytes=30_000)
    assert [each.hashed for each in (*verify(tmp_path / "ours"), *verify(tmp_path / "out"))] == [True, True]
    assert not [each.hashed for each in verify(tmp_path / "theirs") if each.hashed]
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(theirs, back)
    with torch.no_grad():
        assert torch.equal(back(tokens()).logits, logits)


@pytest.mark.parametrize("name", ["dbrx-no-clip-p2", "mixtral-odd"])
def test_every_gradient_is_theirs(name: str, tmp_path: Path) -> None:
    theirs = make(name)
    theirs.save_pretrained(tmp_path)
    ours = Dbrx.from_pretrained(tmp_path)
    ours.config.balance_loss = "huggingface"
    expected = theirs(tokens(), labels=tokens(), output_router_logits=True)
    expected.loss.backward()
    got = ours(tokens(), labels=tokens())
    got.loss.backward()
    assert apart(got.loss, expected.loss) < 1e-6
    assert apart(got.losses["balance"], expected.aux_loss) < 1e-5
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    shapes = {n: tuple(p.shape) for n, p in ours.named_parameters()}
    for our_name, parts in table(ours.config, shapes).items():
        wanted = torch.cat([gradients[p.name].T if p.transposed else gradients[p.name] for p in parts])
        assert apart(ours.get_parameter(our_name).grad, wanted) < 1e-5, our_name


def test_half_the_bytes_are_the_rounded_weights(tmp_path: Path) -> None:
    theirs = make("dbrx")
    theirs.save_pretrained(tmp_path / "theirs")
    export(tmp_path / "theirs", tmp_path / "half", torch.bfloat16, nobody)
    assert_same(
        theirs.bfloat16(), transformers.DbrxForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    )
    import_folder(tmp_path / "half", tmp_path / "kept")
    assert {tensor.dtype for tensor in load_file(tmp_path / "kept" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    export(tmp_path / "kept", tmp_path / "again", torch.bfloat16, nobody)
    name = "model.safetensors"
    assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_save_pretrained_writes_the_same_as_export(tmp_path: Path) -> None:
    for name in ("dbrx", "mixtral"):
        theirs = make(name)
        theirs.save_pretrained(tmp_path / name)
        Dbrx.from_pretrained(tmp_path / name).save_pretrained(tmp_path / f"{name}-back")
        assert_same(theirs, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-back"))


def test_a_run_of_rmsnorm_exports_as_mixtral(tmp_path: Path) -> None:
    config = DbrxConfig.from_hf(json.loads(MODELS["mixtral"]().to_json_string()))
    model = Dbrx(config, seed=3).eval()
    path = save_checkpoint(model, tmp_path)
    export(path, tmp_path / "out", torch.float32, nobody)
    theirs = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert apart(model(tokens()).logits, theirs(tokens()).logits) < 1e-5


def test_the_weight_of_a_balance_loss_is_written_in_mixtrals_convention() -> None:
    hf = json.loads(MODELS["mixtral"]().to_json_string())
    config = DbrxConfig.from_hf(hf | {"router_aux_loss_coef": 0.02})
    assert config.to_hf()["router_aux_loss_coef"] == 0.02
    config.balance_loss = "megablocks"
    assert config.to_hf()["router_aux_loss_coef"] == 0.02 / config.top_k


def save_checkpoint(model: Dbrx, root: Path) -> Path:
    path = folders.step_folder(root / "checkpoints", 3)
    files = write(path, model_tensors(model), None)
    config = {"model": model.config.to_dict(), "tokenizer": {"name": "cl100k_base", "vocab_file": None}}
    folders.commit(path, {"config": config, "data": {}, "time": {"batch": 3, "token": 96}, "files": files})
    return path


# ---------------------------------------------------------------- config.json

ROPE_OF_5 = {"rope_theta": 123.0, "rope_type": "default"}


def test_configs_of_transformers_5_are_read() -> None:
    attn = {"clip_qkv": 8.0, "kv_n_heads": 2, "model_type": "", "attn_pdrop": 0.0}
    ffn = {"ffn_act_fn": {"name": "silu"}, "ffn_hidden_size": 24, "hidden_size": 32, "moe_num_experts": 4}
    written = {
        "attn_config": attn,
        "ffn_config": ffn | {"moe_top_k": 2, "moe_jitter_eps": 0.0},
        "d_model": 32,
        "dtype": "float32",
        "max_seq_len": 32,
        "model_type": "dbrx",
        "n_heads": 4,
        "n_layers": 1,
        "num_key_value_heads": 2,
        "rope_parameters": ROPE_OF_5,
        "vocab_size": 64,
    }
    config = DbrxConfig.from_hf(written)
    assert (config.rope_theta, config.n_kv_heads, config.num_experts, config.top_k) == (123.0, 2, 4, 2)
    agreed = written | {"attn_config": attn | {"rope_theta": 123.0}}
    assert DbrxConfig.from_hf(agreed) == config
    with pytest.raises(ValueError, match=r"^attn_config.rope_theta: 500000.0, but rope_theta is 123.0 else"):
        DbrxConfig.from_hf(written | {"attn_config": attn | {"rope_theta": 5e5}})
    theirs = json.loads(MODELS["mixtral"]().to_json_string())
    del theirs["rope_theta"]
    assert DbrxConfig.from_hf(theirs | {"rope_parameters": ROPE_OF_5}).rope_theta == 123.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sliding_window": 4096}, "sliding_window: 4096 is not supported; must be None"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; must be 'silu'"),
        ({"head_dim": 16}, "head_dim: 16 is not supported; must be width / heads"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_parameters: 'yarn' is not supported"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config.quant_method: 'gptq' is not read; write the weights in bfloat16 first",
        ),
        ({"num_local_experts": 1, "num_experts_per_tok": 1}, "num_experts: must be above 1"),
        ({"model_type": ["mixtral"]}, r"model_type: \['mixtral'\] is not supported; must be one of"),
        (
            {"num_attention_heads": 0},
            "num_attention_heads: 0 is not supported; must be a whole number above 0",
        ),
        ({"num_attention_heads": None}, "num_attention_heads: None is not supported; must be a whole number"),
        ({"num_attention_heads": "2"}, "num_attention_heads: '2' is not supported; must be a whole number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: 'small' is not supported; must be a number"),
        ({"rope_scaling": "linear"}, "rope_scaling: 'linear' is not supported; must be a JSON object"),
        ({"model_type": "dbrx", "attn_config": 5}, "attn_config.*: attn_config is 5; must be a JSON object"),
        (
            {"model_type": "dbrx", "ffn_config": {"ffn_act_fn": "silu"}},
            "ffn_config.ffn_act_fn.name: ffn_act_fn is 'silu'; must be a JSON object",
        ),
        ({"model_type": "llama"}, "model_type: 'llama' is not supported; must be one of dbrx, mixtral"),
    ],
)
def test_what_cannot_be_computed_is_refused(change: dict[str, Any], says: str) -> None:
    theirs = json.loads(MODELS["mixtral"]().to_json_string())
    with pytest.raises(ValueError, match=f"^{says}"):
        DbrxConfig.from_hf(theirs | change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loss_free_bias_rate": 0.1}, "model.loss_free_bias_rate: DbrxForCausalLM has no selection bias"),
        ({"num_experts": 1, "top_k": 1}, "model.num_experts: DbrxForCausalLM has no dense form"),
        ({"norm_eps": 1e-6}, "model.norm_eps: 1e-06 is not what DbrxForCausalLM computes; must be 1e-05"),
        ({"norm": "rmsnorm"}, "model.clip_qkv: 8.0 is not what MixtralForCausalLM computes; must be None"),
    ],
)
def test_what_has_no_place_there_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 51}
    shape |= {"ffn_hidden_size": 8, "num_experts": 3, "top_k": 2}
    path = save_checkpoint(Dbrx(DbrxConfig(**shape | change), seed=0), tmp_path)
    with pytest.raises(ValueError, match=f"^{says}"):
        export(path, tmp_path / "out", torch.float32, nobody)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


# ---------------------------------------------------------------- the tokenizer

TINY = DbrxConfig(d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, ffn_hidden_size=8, num_experts=2, top_k=1)
TEXTS = [
    "",
    "it's IT'S 'ſ don'T we'LL I'd've",
    "  \n\n x\t\ttabs\r\n\r\n  \r x   ",
    "\x1c\x1d a\u0085b \u180e x\u2028y\u200b z\ufeff",
    "１２３４５６ 123456789 ١٢٣٤ ๑๒๓ ½²Ⅷ",
    "é e\u0301 ﬁ ß ẞ İ ı ǅ",
    "👩‍👩‍👧 🏳️‍🌈 日本語テキスト、中文字符。 अनुच्छेद",
    "a" * 700 + " " * 300 + "\n" * 100,
]


def test_the_tokenizer_needs_no_code_and_gives_the_same_ids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    ours = load_tokenizer()
    export(save_checkpoint(Dbrx(TINY, seed=0), tmp_path), tmp_path / "out", torch.bfloat16, nobody)
    assert verify(tmp_path / "out")[0].hashed
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert "incorrect" not in caplog.text, "not taken for another's"
    assert "holes" not in capfd.readouterr().err
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0x110000, (400, 12), generator=generator).tolist()
    texts = [*TEXTS, *("".join(chr(c) for c in row if not 0xD800 <= c < 0xE000) for row in noise)]
    texts += [path.read_text(encoding="utf-8") for path in Path(json.__file__).parent.glob("*.py")]
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, text[:80]
        assert theirs.decode(ids) == text
    chat = [{"role": "user", "content": "Hi ☃"}, {"role": "assistant", "content": "Yo"}]
    for opened in (False, True):
        assert theirs.apply_chat_template(chat, add_generation_prompt=opened) == ours.chat(chat, opened)
    assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (100257, 100277, 100352)
    stops = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (stops.eos_token_id, stops.pad_token_id) == ([100257, 100279], 100277)


# ---------------------------------------------------------------- what is wrong is named


def run_cli(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["dbrx-train", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def edit(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["ffn_config"] |= values.pop("ffn_config", {})
    (path / "config.json").write_text(json.dumps(config | values))


def edit_index(path: Path, name: str, file: str | None) -> None:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = file
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file is not None}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path, place: int = -1000) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


FIRST = "model-00001-of-0000"
BLOCK = "transformer.blocks.0.norm_attn_norm"


def first(path: Path) -> Path:
    return next(path.glob(f"{FIRST}*"))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda p: truncate(first(p)), f"{FIRST}.*: is not a whole safetensors file"),
    "missing shard": (lambda p: first(p).unlink(), f"{FIRST}.*: is missing, though model.safetensors.index"),
    "wrong vocabulary": (
        lambda p: edit_config(p, vocab_size=132),
        r"wte.weight is \[131, 48\], must be \[132",
    ),
    "wrong experts": (
        lambda p: edit_config(p, ffn_config={"moe_num_experts": 5}),
        r"router.layer.weight is \[4, 48\], must be \[5, 48\].*mlp.w1 is \[80, 48\], must be \[100, 48\]",
    ),
    "nan": (
        lambda p: edit(first(p), lambda t: t["transformer.wte.weight"][70, 3].fill_(torch.nan)),
        f"{FIRST}.*: transformer.wte.weight holds values that are not finite",
    ),
    "inf": (
        lambda p: edit(first(p), lambda t: t["transformer.wte.weight"][70, 3].fill_(-torch.inf)),
        f"{FIRST}.*: transformer.wte.weight holds values that are not finite",
    ),
    "integers": (
        lambda p: edit(first(p), lambda t: t.update({"transformer.wte.weight": torch.ones(131, 48).char()})),
        "transformer.wte.weight is int8 without scales, must be one of float32, bfloat16, float16",
    ),
    "names": (
        lambda p: edit(first(p), lambda t: t.update({"wpe": t.pop("transformer.wte.weight")})),
        "transformer.wte.weight is in none, not in model-.*; wpe is in model-.*, not in none",
    ),
    "index": (
        lambda p: (p / "model.safetensors.index.json").write_text("[]"),
        "is damaged; must hold a JSON",
    ),
    "in two files": (
        lambda p: edit(
            max(p.glob("*.safetensors")), lambda t: t.update({"transformer.wte.weight": torch.ones(131, 48)})
        ),
        f"model-.*: holds transformer.wte.weight, which {FIRST}.* holds too",
    ),
    "index of other files": (
        lambda p: edit_index(p, "transformer.wte.weight", max(p.glob("*.safetensors")).name),
        f"index.json: is not of the files beside it: transformer.wte.weight is in {FIRST}.*, not in model-",
    ),
    "index without a tensor": (
        lambda p: edit_index(p, "transformer.wte.weight", None),
        "index.json: is not of the files beside it: transformer.wte.weight is in .*, not in none",
    ),
    "index of a file elsewhere": (
        lambda p: edit_index(p, "transformer.wte.weight", "../x.safetensors"),
        r"index.json: names '../x.safetensors'; must name files beside it alone",
    ),
    "no config": (lambda p: (p / "config.json").unlink(), "no Hugging Face folder; must hold config.json"),
    "not JSON": (lambda p: (p / "config.json").write_text("{"), "config.json: is not JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line_and_exit_2(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make("dbrx").save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    harm, says = DAMAGES[damage]
    harm(tmp_path / "hf")
    out = str(tmp_path / "out")
    assert run_cli(["checkpoint", "import", str(tmp_path / "hf"), "--out", out], monkeypatch) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    with pytest.raises(ValueError, match=says):
        raise ValueError(said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"], "nothing is left behind"


def test_a_bin_file_that_is_no_tensors_is_not_run(tmp_path: Path) -> None:
    make("dbrx").save_pretrained(tmp_path, safe_serialization=False)
    file = tmp_path / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    for zipped in (True, False):
        torch.save(weights, file, _use_new_zipfile_serialization=zipped)
        assert open_weights(tmp_path, nobody).dtypes.keys() == weights.keys()
        for content in (file.read_bytes()[:-100], file.read_bytes()[:700], b"text", b""):
            (tmp_path / "harmed.bin").write_bytes(content)
            with pytest.raises(ValueError, match=r"harmed.bin: is not a whole file of tensors"):
                open_tensors(tmp_path / "harmed.bin")
        torch.save({"x": Runs(tmp_path / "ran")}, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"pytorch_model.bin: is not a whole file of tensors"):
            open_weights(tmp_path, nobody)
        assert not (tmp_path / "ran").exists()
        torch.load(file, weights_only=False)
        (tmp_path / "ran").unlink()  # it would have run


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    """As folders of models that transformers did not know bring it, for ``trust_remote_code``."""
    folder = tmp_path / "hf"
    make("dbrx").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["theirs.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit")
    weights = open_weights(folder, nobody)
    import_folder(folder, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "out", torch.float32, nobody)
    assert Dbrx.from_pretrained(folder).state_dict().keys() == weights.dtypes.keys()
    assert not (tmp_path / "ran").exists()
    for made in ("ours", "out"):
        assert not list((tmp_path / made).glob("*.py"))
        assert all("auto_map" not in path.read_text() for path in (tmp_path / made).glob("*.json"))


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_verify_names_the_first_bad_thing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DbrxConfig.from_hf(json.loads(MODELS["dbrx"]().to_json_string()))
    checkpoint = save_checkpoint(Dbrx(config, seed=0), tmp_path)
    export(checkpoint, tmp_path / "hf", torch.float32, nobody, max_shard_bytes=60_000)
    import_folder(tmp_path / "hf", tmp_path / "ours")
    for path, file, listed in (
        (checkpoint, "__0_0.distcp", folders.MANIFEST),
        (tmp_path / "ours", "model.safetensors", folders.MANIFEST),
        (tmp_path / "hf", first(tmp_path / "hf").name, MANIFEST),
        (tmp_path / "hf", "config.json", MANIFEST),
    ):
        assert run_cli(["checkpoint", "verify", str(path)], monkeypatch) == 0
        assert "sizes and hashes as written" in capsys.readouterr().out
        good = (path / file).read_bytes()
        for harm, says in (
            (lambda p: flip(p, len(p.read_bytes()) // 2), f"{file}: is damaged: its content is not what"),
            (truncate, rf"{file}: has [\d,]+ bytes, not [\d,]+ as written"),
            (Path.unlink, f"{file}: is missing|neither a run"),
            (
                lambda p: (p.parent / "more.bin").write_bytes(b""),
                f"more.bin: is not one of .* {listed} lists",
            ),
        ):
            harm(path / file)
            assert run_cli(["checkpoint", "verify", str(path)], monkeypatch) == 2
            said = capsys.readouterr().err
            with pytest.raises(ValueError, match=says):
                raise ValueError(said)
            (path / file).write_bytes(good)
            (path / "more.bin").unlink(missing_ok=True)
    for path, file in ((checkpoint, folders.MANIFEST), (tmp_path / "hf", MANIFEST)):
        flip(path / file, (path / file).read_bytes().index(b"bytes") + 9)  # a digit of a size
        assert run_cli(["checkpoint", "verify", str(path)], monkeypatch) == 2
        assert "is damaged" in capsys.readouterr().err


def test_a_runs_own_values_must_be_finite(tmp_path: Path) -> None:
    model = Dbrx(DbrxConfig.from_hf(json.loads(MODELS["dbrx"]().to_json_string())), seed=0)
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[130, 3] = torch.nan
    path = save_checkpoint(model, tmp_path)
    for act in (
        lambda: verify(path),
        lambda: export(path, tmp_path / "out", torch.float32, nobody),
        lambda: consolidate(path, tmp_path / "out.safetensors", torch.float32, nobody),
    ):
        with pytest.raises(ValueError, match=r"ba3: (model\.)?lm_head.weight holds values that are not"):
            act()
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoints"], "nothing is left behind"


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no such call here")
def test_a_full_disk_is_named_and_a_disk_that_cannot_say_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint(Dbrx(DENSE, seed=0), tmp_path)

    def refuse(*rest: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    number = errno.ENOSPC
    with pytest.raises(OSError, match="No space left") as caught:
        consolidate(path, tmp_path / "out.safetensors", torch.float32, nobody)
    assert caught.value.filename == str(tmp_path / "out.safetensors")
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoints"], "nothing is left behind"
    number = errno.EOPNOTSUPP
    consolidate(path, tmp_path / "out.safetensors", torch.float32, nobody)
    assert verify(tmp_path / "out.safetensors")


def test_what_is_wrong_on_a_rank_is_raised_whatever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Dbrx(DENSE, seed=0)
    weights = open_weights(save_checkpoint(model, tmp_path), nobody)
    said = []

    def fail(tensors: dict[str, Tensor]) -> None:
        raise RuntimeError("out of memory")

    def gather(found: list[str | None], mine: str | None, group: Any = None) -> None:
        said.append(mine)
        found[:] = [mine, None]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(RuntimeError, match="out of memory"):
        read_together(replace(weights, read=fail), model)
    assert said == ["out of memory"], "and the others hear of it"


def test_a_run_of_another_vocabulary_is_not_read_back_as_cl100k(tmp_path: Path) -> None:
    path = save_checkpoint(Dbrx(TINY, seed=0), tmp_path)
    export(path, tmp_path / "usual", torch.bfloat16, nobody)
    usual = {"name": "cl100k_base", "vocab_file": None}
    assert open_weights(tmp_path / "usual", nobody).config["tokenizer"] == usual
    swapped = dict(load_tokenizer().ranks)
    swapped[b"a"], swapped[b"b"] = swapped[b"b"], swapped[b"a"]
    ranks = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in swapped.items())
    (tmp_path / "own.tiktoken").write_bytes(ranks)
    facts = folders.parse(path)
    facts["config"]["tokenizer"]["vocab_file"] = str(tmp_path / "own.tiktoken")
    folders.commit(path, facts)
    export(path, tmp_path / "own", torch.bfloat16, nobody)
    assert open_weights(tmp_path / "own", nobody).config["tokenizer"] is None


def test_a_tokenizer_that_is_not_there_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_checkpoint(Dbrx(TINY, seed=0), tmp_path)
    facts = folders.parse(path)
    facts["config"]["tokenizer"]["vocab_file"] = str(tmp_path / "gone")
    folders.commit(path, facts)
    monkeypatch.setattr(huggingface, "write", nobody)
    with pytest.raises(ValueError, match="gone"):
        export(path, tmp_path / "out", torch.float32, nobody)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["a"], "files: .'a'. is no JSON object"),
        ({"config.json": {}}, "files.config.json: {} is not a size, nor a size and a hash"),
        ({"config.json": "7"}, "files.config.json: '7' is not a size"),
        ({"../x": 7}, "names '../x'; must name files beside it alone"),
        ({"/etc/passwd": 7}, "names '/etc/passwd'; must name"),
    ],
)
def test_what_lists_files_is_not_trusted(files: Any, says: str, tmp_path: Path) -> None:
    make("dbrx").save_pretrained(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"files": files}))
    with pytest.raises(ValueError, match=f"{MANIFEST}: {says}"):
        verify(tmp_path)
    (tmp_path / "ba1").mkdir()
    folders.commit(tmp_path / "ba1", {"config": {}, "data": {}, "time": {}, "files": files})
    with pytest.raises(ValueError, match=f"ba1: not a whole checkpoint .*{says}"):
        folders.read(tmp_path / "ba1")


def test_marks_without_hashes_are_still_read(tmp_path: Path) -> None:
    config = DbrxConfig.from_hf(json.loads(MODELS["dbrx"]().to_json_string()))
    path = save_checkpoint(Dbrx(config, seed=0), tmp_path)
    facts = folders.parse(path)
    facts["files"] = {name: each["bytes"] for name, each in facts["files"].items()}
    del facts["config"]["model"]["norm"]
    folders.commit(path, facts)
    assert folders.read(path).tokens == 96
    (found,) = verify(tmp_path)
    assert (found.files, found.hashed) == (2, False)
    assert "no hashes were kept" in str(found)


def test_a_tensor_that_is_missing_from_a_checkpoint_is_named(tmp_path: Path) -> None:
    config = DbrxConfig.from_hf(json.loads(MODELS["dbrx"]().to_json_string()))
    path = save_checkpoint(Dbrx(config, seed=0), tmp_path)
    facts = folders.parse(path)
    facts["config"]["model"]["n_layers"] = 3
    folders.commit(path, facts)
    with pytest.raises(
        ValueError, match=r"model.transformer.blocks.2.norm_attn_norm.norm_1.weight is missing"
    ):
        verify(path)


# ---------------------------------------------------------------- upcycling

DENSE = DbrxConfig(
    d_model=24, n_layers=2, n_heads=3, n_kv_heads=3, ffn_hidden_size=21, vocab_size=131, max_seq_len=64,
    num_experts=1, top_k=1, init_std=0.2,
)  # fmt: skip


@pytest.mark.parametrize("in_one_file", [False, True])
def test_an_upcycled_model_computes_what_the_dense_one_does(in_one_file: bool, tmp_path: Path) -> None:
    dense = Dbrx(DENSE, seed=2).eval()
    path = save_checkpoint(dense, tmp_path)
    if in_one_file:
        consolidate(path, tmp_path / "dense.safetensors", torch.float32, nobody)
        path = tmp_path / "dense.safetensors"
        assert verify(path)[0].tensors == len(dense.state_dict())
    config = DbrxConfig.from_dict(
        DENSE.to_dict() | {"num_experts": 5, "top_k": 3, "loss_free_bias_rate": 0.1}
    )
    model = Dbrx(config, seed=7)
    drawn = {name: t.clone() for name, t in model.state_dict().items() if ".router." in name}
    upcycled(open_weights(path, nobody), config).read(model.state_dict())
    with torch.no_grad():
        got = model.eval()(tokens())
        assert apart(got.logits, dense(tokens()).logits) < 1e-6
    assert all(torch.equal(model.state_dict()[name], t) for name, t in drawn.items())
    assert got.routing is not None
    assert (got.routing.tokens_per_expert > 0).sum() > 5, "tokens go to different experts"


@pytest.mark.parametrize(
    ("source", "change", "says"),
    [
        ({"num_experts": 2}, {"num_experts": 4}, "has 2 experts a layer already; must be dense to upcycle"),
        ({}, {}, "model.num_experts: is 1; upcycling makes experts"),
        (
            {},
            {"num_experts": 4, "normalize_expert_weights": None},
            "normalize_expert_weights: is None; must be",
        ),
        (
            {},
            {"num_experts": 4, "normalize_expert_weights": 2.0},
            "normalize_expert_weights: is 2.0; must be",
        ),
    ],
)
def test_what_cannot_be_upcycled_is_refused(
    source: dict[str, Any], change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = save_checkpoint(Dbrx(DbrxConfig.from_dict(DENSE.to_dict() | source), seed=0), tmp_path)
    with pytest.raises(ValueError, match=says):
        upcycled(open_weights(path, nobody), DbrxConfig.from_dict(DENSE.to_dict() | change))


# ---------------------------------------------------------------- many ranks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_reads_its_own_rows_and_all_hear_of_what_one_finds(
    ranks: int, tmp_path: Path, warm: Warm
) -> None:
    jobs: list[list[Any]] = []
    for name, expert in (("dbrx", 1), ("dbrx", ranks), ("mixtral", 1), ("mixtral", 2)):
        path = tmp_path / name
        if not path.exists():
            make(name).save_pretrained(path, max_shard_size="40KB")
        jobs.append([str(path), DbrxConfig.from_hf(path).to_dict(), expert, False])
    dense = save_checkpoint(Dbrx(DENSE, seed=2), tmp_path)
    for expert in (1, 2):
        jobs.append([str(dense), DENSE.to_dict() | {"num_experts": 4, "top_k": 3}, expert, True])
    make("dbrx").save_pretrained(tmp_path / "nan", max_shard_size="40KB")
    # In the head, whose last rows are the last rank's alone.
    file = max((tmp_path / "nan").glob("*.safetensors"))
    edit(file, lambda tensors: tensors["lm_head.weight"][130, 3].fill_(torch.nan))
    jobs.append([str(tmp_path / "nan"), DbrxConfig.from_hf(tmp_path / "nan").to_dict(), 1, False])

    program = str(HELPERS / "weights_ranks.py")
    *found, damaged = json.loads(warm.torchrun(ranks, program, json.dumps(jobs)).splitlines()[-1])
    for each, job in zip(found, jobs, strict=False):
        assert each["wrong"] == [], job
        if not job[3]:
            assert each["read"] == each["share"], "not a row of another rank's"
    assert damaged["said"] == [f"{file}: lm_head.weight holds values that are not finite"] * ranks
