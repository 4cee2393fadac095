"""The whole model: documents, losses, initialisation, folders and generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dbrx_train import Dbrx, DbrxConfig
from dbrx_train.model import decoder
from dbrx_train.model.decoder import document_positions
from dbrx_train.model.generation import KVCache, generate, sample
from dbrx_train.model.hf import files
from dbrx_train.model.init import ROWS_PER_BLOCK, draw_rows, init_weights

VOCAB = 97


def config_of(**changes: Any) -> DbrxConfig:
    base = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": VOCAB,
        "max_seq_len": 64,
        "ffn_hidden_size": 24,
        "num_experts": 4,
        "top_k": 2,
        "init_std": 0.2,
        "init_residual_scaling": False,
    }
    return DbrxConfig(**(base | changes))


def tokens_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- packed documents


def packed_and_padded() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Three documents of 5, 9 and 3 tokens in one row with 2 of padding; and a row of 11 for each."""
    lengths, width = (5, 9, 3), 11
    documents = [tokens_of(n, seed=n) for n in lengths]
    packed = torch.cat([*documents, tokens_of(2, seed=99)])[None]
    packed_ids = torch.tensor([0] * 5 + [1] * 9 + [2] * 3 + [-1] * 2)[None]
    padded = torch.stack([torch.cat([d, tokens_of(width - len(d), seed=50)]) for d in documents])
    padded_ids = torch.stack([(torch.arange(width) < n).long() - 1 for n in lengths])
    return (packed, packed_ids), (padded, padded_ids)


@pytest.mark.parametrize("reset_positions", [False, True])
@pytest.mark.parametrize("balance_loss", ["megablocks", "huggingface"])
def test_packed_documents_train_as_padded_ones(balance_loss: str, reset_positions: bool) -> None:
    config = config_of(
        balance_loss=balance_loss,
        balance_loss_weight=0.7,
        router_z_loss_weight=0.3,
        output_z_loss_weight=0.2,
        reset_positions=reset_positions,
        loss_chunk_size=7,
    )
    model = Dbrx(config, seed=0)
    outputs, gradients = [], []
    for tokens, document_ids in packed_and_padded():
        output = model(tokens, labels=tokens, document_ids=document_ids)
        outputs.append(output)
        gradients.append(torch.autograd.grad(output.loss, list(model.parameters())))
    packed, padded = outputs
    assert packed.num_labels == padded.num_labels == 4 + 8 + 2
    assert set(packed.losses) == {"cross_entropy", "balance", "router_z", "output_z"}
    for name, value in packed.losses.items():
        torch.testing.assert_close(value, padded.losses[name], rtol=1e-5, atol=0)
    assert torch.equal(packed.routing.tokens_per_expert, padded.routing.tokens_per_expert)
    assert packed.routing.tokens_per_expert.sum(1).tolist() == [17 * 2] * 2
    torch.testing.assert_close(packed.routing.entropy, padded.routing.entropy)
    for (name, _), a, b in zip(model.named_parameters(), *gradients, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), name
    raw = packed.losses
    expected = raw["cross_entropy"] + 0.7 * raw["balance"] + 0.3 * raw["router_z"] + 0.2 * raw["output_z"]
    torch.testing.assert_close(packed.loss, expected)


def test_positions_restart_at_each_document() -> None:
    document_ids = torch.tensor([[0, 0, 0, 1, 2, 2, -1], [4, 4, 4, 4, 4, 4, 4]])
    expected = [[0, 1, 2, 0, 0, 1, 0], [0, 1, 2, 3, 4, 5, 6]]
    assert document_positions(document_ids).tolist() == expected


@pytest.mark.parametrize("mask_documents", [False, True])
def test_documents_do_not_see_one_another(mask_documents: bool) -> None:
    model = Dbrx(config_of(mask_documents=mask_documents), seed=0)
    (tokens, document_ids), _ = packed_and_padded()
    changed = tokens.clone()
    changed[0, :5] = tokens_of(5, seed=7)
    before, after = (model(t, document_ids=document_ids).logits[0] for t in (tokens, changed))
    # Not to the bit: other tokens make other expert batches, and with them other orders of summation.
    assert torch.allclose(before[5:14], after[5:14], rtol=0, atol=1e-5) == mask_documents
    assert not torch.allclose(before[:5], after[:5], rtol=0, atol=1e-3)


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_share_one_document_mask(autocast: bool) -> None:
    """What backward keeps of the size of a mask is one tensor, however many layers there are."""
    batch, width = 2, 250  # wider than any activation, and not a length that kernels like
    tokens = tokens_of(batch, width)
    document_ids = (torch.arange(width) // 100).expand(batch, -1)
    for n_layers in (1, 3):
        model = Dbrx(config_of(n_layers=n_layers, max_seq_len=width), seed=0)
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.nbytes() >= batch * width**2 * tensor.element_size():
                kept[storage.data_ptr()] = tensor
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            model(tokens, labels=tokens, document_ids=document_ids)
        assert len(kept) == 1
        assert next(iter(kept.values())).dtype == (torch.bfloat16 if autocast else torch.float32)


def loss_and_gradients(model: Dbrx, tokens: Tensor, document_ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(tokens, labels=tokens, document_ids=document_ids).loss
    assert loss is not None
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reset_positions", [False, True])
def test_long_samples_are_attended_to_by_document_as_by_mask(
    reset_positions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Dbrx(config_of(reset_positions=reset_positions), seed=0)
    tokens = tokens_of(2, 24)
    documents = torch.tensor([[0] * 7 + [1] * 16 + [-1], [5] * 24])
    masked = loss_and_gradients(model, tokens, documents)
    monkeypatch.setattr(decoder, "LONGEST_MASK", 23)
    apart = loss_and_gradients(model, tokens, documents)
    for name, expected in masked.items():
        torch.testing.assert_close(apart[name], expected, rtol=1e-5, atol=1e-6)
    documents[0, 2] = 1
    with pytest.raises(ValueError, match="document_ids: has a document in pieces"):
        model(tokens, document_ids=documents)


def test_a_sample_of_32k_tokens_needs_no_mask() -> None:
    length = 32_768
    model = Dbrx(config_of(max_seq_len=length, n_layers=1), seed=0)
    ends = torch.tensor([9_000, 9_001, 20_000, length])
    documents = torch.bucketize(torch.arange(length), ends, right=True)[None]
    tokens = tokens_of(1, length)
    made = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal made
            out = func(*args, **(kwargs or {}))
            made = max(made, out.numel() if isinstance(out, Tensor) else 0)
            return out

    with Largest():
        packed = model(tokens, document_ids=documents)
    assert made < length**2 / 50
    assert packed.logits is not None
    alone = model(tokens[:, :9_000])
    torch.testing.assert_close(packed.logits[:, :9_000], alone.logits, rtol=1e-5, atol=1e-5)


def test_without_document_masking_boundaries_are_predicted_but_padding_is_not() -> None:
    (tokens, document_ids), _ = packed_and_padded()
    model = Dbrx(config_of(mask_documents=False, balance_loss="none"), seed=0)
    output = model(tokens, labels=tokens, document_ids=document_ids)
    assert output.num_labels == 16
    bare = model(tokens[:, :17], labels=tokens[:, :17])
    torch.testing.assert_close(output.loss, bare.loss)


def test_the_future_is_not_seen() -> None:
    model = Dbrx(config_of(), seed=0)
    tokens = tokens_of(1, 12)
    changed = tokens.clone()
    changed[0, 7:] = tokens_of(5, seed=3)
    before, after = model(tokens).logits[0], model(changed).logits[0]
    torch.testing.assert_close(before[:7], after[:7], rtol=0, atol=1e-5)
    assert not torch.allclose(before[7:], after[7:], rtol=0, atol=1e-3)


# ---------------------------------------------------------------- output and input


def test_what_comes_back() -> None:
    model, tokens = Dbrx(config_of(), seed=0), tokens_of(2, 8)
    plain = model(tokens)
    assert plain.loss is None
    assert plain.losses == {}
    assert plain.logits.shape == (2, 8, VOCAB)
    trained = model(tokens, labels=tokens)
    assert trained.logits is None
    assert set(trained.losses) == {"cross_entropy", "balance"}
    both = model(tokens, labels=tokens, return_logits=True)
    expected = torch.nn.functional.cross_entropy(both.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(both.losses["cross_entropy"], expected)


def test_dense_model_trains_without_routing() -> None:
    model, tokens = Dbrx(config_of(num_experts=1, top_k=1), seed=0), tokens_of(2, 8)
    output = model(tokens, labels=tokens)
    output.loss.backward()
    assert output.routing is None
    assert set(output.losses) == {"cross_entropy"}
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"input_ids": torch.zeros(8, dtype=torch.long)}, "input_ids"),
        ({"input_ids": tokens_of(1, 65)}, "input_ids"),
        ({"input_ids": tokens_of(1, 8), "labels": tokens_of(1, 7)}, "labels"),
        ({"input_ids": tokens_of(1, 8), "document_ids": tokens_of(2, 8)}, "document_ids"),
        (
            {"input_ids": tokens_of(1, 8), "document_ids": tokens_of(1, 8), "cache": KVCache(2, 9)},
            "document_ids",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(kwargs: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        Dbrx(config_of(), seed=0)(**kwargs)


@pytest.mark.parametrize("expert_impl", ["loop", "grouped"])
def test_autocast_stays_near_float32(expert_impl: str) -> None:
    config = config_of(expert_impl=expert_impl, init_std=0.05)
    model, tokens = Dbrx(config, seed=0), tokens_of(2, 16)
    exact = model(tokens, labels=tokens).loss
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens, labels=tokens)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.item(), rel=2e-2)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_a_bfloat16_model_runs() -> None:
    model, tokens = Dbrx(config_of(init_std=0.05), seed=0), tokens_of(2, 16)
    exact = model(tokens, labels=tokens).loss.item()
    output = model.bfloat16()(tokens, labels=tokens, return_logits=True)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.item() == pytest.approx(exact, rel=2e-2)


def test_a_few_steps_overfit_a_batch() -> None:
    model, tokens = Dbrx(config_of(init_std=0.02), seed=0), tokens_of(2, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        output = model(tokens, labels=tokens)
        losses.append(output.losses["cross_entropy"].item())
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 < 4 < losses[0]


def test_update_expert_bias_reaches_every_layer() -> None:
    model = Dbrx(config_of(loss_free_bias_rate=0.1, balance_loss="none"), seed=0)
    model.update_expert_bias(torch.tensor([[4, 0, 0, 0], [0, 0, 0, 4]]))
    biases = [block.ffn.router.expert_bias for block in model.transformer.blocks]
    torch.testing.assert_close(biases[0], torch.tensor([-0.1, 0.1, 0.1, 0.1]))
    torch.testing.assert_close(biases[1], torch.tensor([0.1, 0.1, 0.1, -0.1]))


# ---------------------------------------------------------------- initialisation


@pytest.mark.parametrize("method", ["normal", "trunc_normal", "kaiming_normal"])
def test_meta_construction_then_init_equals_direct_construction(method: str) -> None:
    config = config_of(init_method=method, vocab_size=600, loss_free_bias_rate=0.1)
    direct = Dbrx(config, seed=5)
    before = torch.get_rng_state()
    with torch.device("meta"):
        late = Dbrx(config)
    assert all(t.is_meta for t in late.state_dict().values())
    late.to_empty(device="cpu")
    late.init_weights(5)
    assert torch.equal(before, torch.get_rng_state())
    for name, tensor in direct.state_dict().items():
        assert torch.equal(tensor, late.state_dict()[name]), name
    other = Dbrx(config, seed=6)
    assert not torch.equal(direct.lm_head.weight, other.lm_head.weight)


def test_the_default_seed_is_torchs() -> None:
    torch.manual_seed(11)
    assert torch.equal(Dbrx(config_of()).lm_head.weight, Dbrx(config_of(), seed=11).lm_head.weight)


@pytest.mark.parametrize(("start", "stop"), [(0, 700), (0, 1), (255, 257), (300, 600), (512, 700)])
def test_a_shard_draws_what_the_whole_would_have(start: int, stop: int) -> None:
    config = config_of(vocab_size=700)
    whole = Dbrx(config, seed=5).lm_head.weight
    assert torch.equal(draw_rows("lm_head.weight", config, 5, (700, 32), start, stop), whole[start:stop])


def test_init_distributions() -> None:
    shape = {"d_model": 128, "ffn_hidden_size": 192, "vocab_size": 512, "init_residual_scaling": True}
    residual = (2 * 2) ** -0.5
    for method, std, w2_std in (
        ("normal", 0.03, 0.03),
        ("trunc_normal", 0.0296, 0.0296),  # cutting a normal at 3 sigma takes 1.3 % off its deviation
        ("kaiming_normal", (2 / 128) ** 0.5, (2 / 192) ** 0.5),
    ):
        model = Dbrx(config_of(**shape, init_method=method, init_std=0.03), seed=0)
        block = model.transformer.blocks[0]
        for weight, expected in (
            (model.transformer.wte.weight, std),
            (model.lm_head.weight, std),
            (block.norm_attn_norm.attn.Wqkv.weight, std),
            (block.norm_attn_norm.attn.out_proj.weight, std * residual),
            (block.ffn.experts.mlp.w1, std),
            (block.ffn.experts.mlp.w2, w2_std * residual),
        ):
            assert weight.std().item() == pytest.approx(expected, rel=0.03)
        blocks = model.transformer.wte.weight.split(ROWS_PER_BLOCK)
        assert len(blocks) == 2
        assert not torch.equal(*blocks)
        if method == "trunc_normal":
            assert model.lm_head.weight.abs().max() <= 0.09
        for name, parameter in model.named_parameters():
            if "norm" in name.split(".")[-2]:
                assert torch.equal(parameter, torch.ones(128)), name


def test_init_weights_restores_everything() -> None:
    model = Dbrx(config_of(loss_free_bias_rate=0.1), seed=4)
    expected = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(9)
    init_weights(model, model.config, 4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


# ---------------------------------------------------------------- Hugging Face folders


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_folder_round_trip(tmp_path: Path, max_shard_bytes: int) -> None:
    model = Dbrx(config_of(), seed=0)
    files.save(model, tmp_path, max_shard_bytes)
    sharded = (tmp_path / files.INDEX_FILE).exists()
    assert sharded == (max_shard_bytes < 10**9)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    loaded = Dbrx.from_pretrained(tmp_path)
    assert loaded.config == model.config.from_hf(model.config.to_hf())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_folder_dtype_is_kept_or_cast(tmp_path: Path) -> None:
    model = Dbrx(config_of(), seed=0).bfloat16()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {p.dtype for p in Dbrx.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    cast = Dbrx.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in cast.parameters()} == {torch.float32}
    assert torch.equal(cast.lm_head.weight, model.lm_head.weight.float())


def test_a_second_save_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    files.save(Dbrx(config_of(), seed=0), tmp_path, 20_000)
    second = Dbrx(config_of(), seed=1)
    second.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    files.save(second, tmp_path, 20_000)
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(Dbrx.from_pretrained(tmp_path).lm_head.weight, second.lm_head.weight)


def test_every_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    Dbrx(config_of(), seed=0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layers": 3, "vocab_size": 98}))
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        Dbrx.from_pretrained(tmp_path)
    message = str(error.value)
    assert "missing transformer.blocks.2.ffn.experts.mlp.w1" in message
    assert "lm_head.weight is [97, 32], must be [98, 32]" in message
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layers": 1}))
    with pytest.raises(ValueError, match=r"unexpected transformer\.blocks\.1\.ffn\.router\.layer\.weight"):
        Dbrx.from_pretrained(tmp_path)


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    files.save(Dbrx(config_of(), seed=0), tmp_path, 20_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{shard.name}: is not a whole safetensors file"):
        Dbrx.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name}: is missing"):
        Dbrx.from_pretrained(tmp_path)
    (tmp_path / files.INDEX_FILE).unlink()
    with pytest.raises(ValueError, match=r"holds no weights"):
        Dbrx.from_pretrained(tmp_path)


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("steps", [[1] * 14, [6] + [1] * 8, [5, 4, 5]])
def test_cached_logits_equal_uncached_ones(steps: list[int]) -> None:
    model, tokens = Dbrx(config_of(), seed=0).eval(), tokens_of(3, 14)
    expected = model(tokens).logits
    cache = KVCache(2, 14)
    with torch.no_grad():
        got = torch.cat([model(part, cache=cache).logits for part in tokens.split(steps, dim=1)], dim=1)
    assert cache.length == 14
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_full_cache_is_refused() -> None:
    model, cache = Dbrx(config_of(), seed=0), KVCache(2, 4)
    with pytest.raises(ValueError, match=r"^input_ids: 5 tokens do not fit; must be at most 4"):
        model(tokens_of(1, 5), cache=cache)


def test_greedy_generation_is_repeated_argmax() -> None:
    model, tokens = Dbrx(config_of(), seed=0).eval(), tokens_of(2, 5)
    got = torch.stack(list(generate(model, tokens, 8, stop_ids=())), dim=1)
    for _ in range(8):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, tokens[:, 5:])


def test_generation_stops_once_every_row_has() -> None:
    model, tokens = Dbrx(config_of(), seed=0).eval(), tokens_of(2, 5)
    free = torch.stack(list(generate(model, tokens, 20, stop_ids=())), dim=1)
    stops = {int(free[0, 1]), int(free[1, 4])}
    ends = [next(i for i, t in enumerate(row.tolist()) if t in stops) for row in free]
    got = torch.stack(list(generate(model, tokens, 20, stop_ids=stops)), dim=1)
    assert got.shape[1] == max(ends) + 1
    for row, reference, end in zip(got, free, ends, strict=True):
        assert torch.equal(row[: end + 1], reference[: end + 1])
        assert (row[end:] == reference[end]).all()


def test_generation_leaves_the_callers_gradient_mode_alone() -> None:
    model = Dbrx(config_of(), seed=0)
    for _ in generate(model, tokens_of(1, 3), 2, stop_ids=()):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"max_new_tokens": 62}, "max_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2, "temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 2, "top_p": -0.1}, "top_p"),
    ],
)
def test_generation_refuses_at_once(kwargs: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        generate(Dbrx(config_of(), seed=0), tokens_of(1, 3), **kwargs)


def test_sampling_follows_temperature_and_top_p() -> None:
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = probs.log().expand(20_000, 4)
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()

    def shares(temperature: float, top_p: float = 1.0) -> Tensor:
        options = [temperature] * len(draws), [top_p] * len(draws)
        return sample(logits, *options, draws).bincount(minlength=4) / len(draws)

    def near(expected: Tensor) -> Any:
        return pytest.approx(expected.tolist(), abs=0.02)

    assert sample(logits[:1], [0.0], [1.0], [0.9]).item() == 1
    assert shares(temperature=1.0).tolist() == near(probs)
    assert shares(temperature=0.5).tolist() == near(probs**2 / (probs**2).sum())
    assert shares(temperature=1.0, top_p=0.6).tolist() == near(torch.tensor([0.0, 4 / 7, 0.0, 3 / 7]))
    for least in (0.01, 0.0):
        assert shares(temperature=1.0, top_p=least).tolist() == [0.0, 1.0, 0.0, 0.0]
