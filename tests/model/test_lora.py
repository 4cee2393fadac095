"""Adapters: the model they begin as, the gradients they get, what they merge to, what they are saved as."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parallel_ranks import CONFIG as SIZES
from paths import HELPERS
from safetensors.torch import load_file
from tiny_run import run_yaml, saved_tensors
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from typer.testing import CliRunner
from warm import Warm

from dbrx_train.checkpoint.adapter import product, write_adapter
from dbrx_train.checkpoint.huggingface import export
from dbrx_train.checkpoint.verify import verify
from dbrx_train.checkpoint.weights import consolidate, load_model, open_weights
from dbrx_train.cli import app
from dbrx_train.config import ConfigError, OptimizerConfig, load
from dbrx_train.model.config import LORA_TARGETS, DbrxConfig
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.lora import apply_lora, cast_frozen, factor_names, is_factor
from dbrx_train.parallel import MeshShape, parallelize
from dbrx_train.train.optim import build_optimizer
from dbrx_train.train.run import run

CONFIG = replace(SIZES, balance_loss_weight=0.05)
TOKENS = torch.randint(101, (3, 9), generator=torch.Generator().manual_seed(0))
LORA = {"rank": 3, "alpha": 5.0}


def adapted(
    targets: tuple[str, ...] = LORA_TARGETS, config: DbrxConfig = CONFIG, trained: bool = True
) -> Dbrx:
    model = Dbrx(config, seed=3)
    apply_lora(model, 3, 5.0, targets, seed=4)
    if trained:  # B is 0 at first
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B.weight", "_B")):
                parameter.data.normal_(std=0.3, generator=generator)
    return model


def merged(model: Dbrx) -> dict[str, Tensor]:
    """The weights plus what the factors add, differentiable in the factors."""
    own = dict(model.named_parameters())
    result = {}
    for name, weight in own.items():
        a, b = factor_names(name)
        if a in own:
            weight = weight + product(own[a], own[b], LORA, 0, weight.shape[0])
        if not is_factor(name):
            result[name] = weight
    return result


@pytest.mark.parametrize("targets", [LORA_TARGETS, ("Wqkv",), ("w2",), ("out_proj", "w1")])
def test_at_first_it_is_the_model_and_then_the_merged_one(targets: tuple[str, ...]) -> None:
    plain = Dbrx(CONFIG, seed=3)
    expected = plain(TOKENS).logits
    at_first = adapted(targets, trained=False)(TOKENS).logits
    torch.testing.assert_close(at_first, expected, rtol=1e-6, atol=1e-6)
    model = adapted(targets)
    found = model(TOKENS).logits
    assert (found - expected).abs().max() > 0.1
    plain.load_state_dict(merged(model))
    torch.testing.assert_close(found, plain(TOKENS).logits, rtol=1e-4, atol=1e-4)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, _ in model.named_parameters() if is_factor(name)}
    adapts = {target for target in targets for name in trains if target in name}
    assert adapts == set(targets)
    assert len(trains) == 2 * 2 * len(targets)


@pytest.mark.parametrize("experts", [32, 1])
def test_every_gradient_is_that_of_the_weights_with_the_product_added(experts: int) -> None:
    config = DbrxConfig.from_dict({**CONFIG.to_dict(), "num_experts": experts, "top_k": min(2, experts)})
    model, plain = adapted(config=config).double(), Dbrx(config, seed=3).double()
    model(TOKENS, labels=TOKENS).loss.backward()
    factors = [p for p in model.parameters() if p.requires_grad]
    loss = functional_call(plain, merged(model), (TOKENS,), {"labels": TOKENS}).loss
    for (name, parameter), expected in zip(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad],
        torch.autograd.grad(loss, factors),
        strict=True,
    ):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-9, msg=name)
        assert parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_factors_pass_through_torchs_grouped_product_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this torch has no grouped_mm, a stand-in with its documented meaning."""
    calls = []

    def grouped_mm(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        calls.append(b.shape)
        sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
        return torch.cat([rows @ b[e] for e, rows in enumerate(a.split(sizes))])

    config = DbrxConfig.from_dict({**CONFIG.to_dict(), "ffn_hidden_size": 16})
    x, counts = torch.randn(40, 24), torch.tensor([2] * 8 + [1] * 24)
    model = Dbrx(config, seed=3)
    apply_lora(model, 4, 8.0, seed=4)
    for name, parameter in model.named_parameters():
        if name.endswith("_B"):
            parameter.data.normal_()
    layer = model.transformer.blocks[0].ffn.experts.mlp
    if hasattr(F, "grouped_mm"):
        monkeypatch.delattr(F, "grouped_mm")
    plain = layer(x, counts)
    monkeypatch.setattr(F, "grouped_mm", grouped_mm, raising=False)
    torch.testing.assert_close(layer(x, counts), plain, rtol=1e-5, atol=1e-5)
    assert len(calls) == 9, "three matrices, each with two factors"


def test_with_full_rank_and_orthogonal_a_the_first_step_is_that_of_the_weights() -> None:
    """B's step is -lr s G A', so the weight moves by s B A = -lr s^2 G A'A = -lr s^2 G."""
    plain, model = Dbrx(CONFIG, seed=3), Dbrx(CONFIG, seed=3)
    apply_lora(model, CONFIG.d_model, 2.0 * CONFIG.d_model, seed=4)
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        if name.endswith(("lora_A.weight", "_A")):
            for square in parameter.data.split(CONFIG.d_model):
                torch.nn.init.orthogonal_(square)
    for each in (plain, model):
        each(TOKENS, labels=TOKENS).loss.backward()
    lora = {"rank": CONFIG.d_model, "alpha": 2.0 * CONFIG.d_model}
    for name, weight in plain.named_parameters():
        a, b = factor_names(name)
        if a in own:
            moved = product(own[a], -own[b].grad, lora, 0, weight.shape[0])
            torch.testing.assert_close(moved, -4 * weight.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_frozen_matrices_in_bfloat16_change_no_number_under_autocast_to_it() -> None:
    wide, narrowed = adapted(), adapted()
    cast_frozen(narrowed, torch.bfloat16)
    size = sum(p.numel() * p.element_size() for p in narrowed.parameters() if not p.requires_grad)
    assert size < 0.6 * sum(4 * p.numel() for p in wide.parameters() if not p.requires_grad)
    for model in (wide, narrowed):
        with torch.autocast("cpu", torch.bfloat16):
            model(TOKENS, labels=TOKENS).loss.backward()
    plain = Dbrx(CONFIG, seed=3)
    assert {n for n in wide.state_dict() if not is_factor(n)} == set(plain.state_dict())
    for (name, p), q in zip(wide.named_parameters(), narrowed.parameters(), strict=True):
        if p.requires_grad:
            assert q.dtype == torch.float32
            assert torch.equal(p.grad, q.grad), name


def test_only_factors_are_optimised_and_the_learning_rate_groups_stay() -> None:
    model = adapted(trained=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-2))
    assert {group["name"] for group in optimizer.param_groups} == {"matrices", "experts"}
    for _ in range(2):  # A moves once B has
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != is_factor(name), name


def test_what_is_no_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match="rank: must be at least 1, not 0"):
        apply_lora(Dbrx(CONFIG, seed=3), 0, 1.0)
    with pytest.raises(ValueError, match="targets: 'router' is not one of Wqkv, out_proj, w1, v1, w2"):
        apply_lora(Dbrx(CONFIG, seed=3), 1, 1.0, ["router"])
    with torch.device("meta"):
        model = Dbrx(CONFIG)
    apply_lora(model, 3, 1.0)
    with pytest.raises(ValueError, match=r"shard: 34 does not divide the 96 rows of .*lora.w1_A, .* use 32"):
        parallelize(model, MeshShape.of(34, expert=2), device_type="cpu", seed=0)


@pytest.mark.slow
def test_every_gradient_of_adapters_on_every_mesh(warm: Warm) -> None:
    meshes = [[1, 2, 1], [2, 1, 1], [1, 2, 2]]
    program = str(HELPERS / "lora_ranks.py")
    results = json.loads(warm.torchrun(2, program, json.dumps(meshes)))
    assert len(results) == 6
    for number, found in enumerate(results):
        assert found["initial"] == 0, "factors are drawn alike, bit for bit"
        assert found["frozen"] == 0
        if number % 2:  # bfloat16
            assert max(found["gradients"].values()) < 0.03, found["gradients"]
        else:
            assert max(found["gradients"].values()) < 1e-5, found["gradients"]
            # after two steps of Adam, which divides small gradients by small
            assert found["weights"] < 1e-4
        assert found["read"] == 0, "a checkpoint of these factors alone is read back"


@pytest.fixture(scope="module")
def base(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder to begin from."""
    folder = tmp_path_factory.mktemp("base")
    run(load(run_yaml(workplace, folder, "base"), ["max_duration=2ba", "evaluation.max_samples=0"]))
    return folder / "base"


def lora_run(workplace: Path, base: Path, folder: Path, name: str, *options: str) -> Path:
    path = run_yaml(workplace, folder, name)
    fixed = [f"init_from.path={base}", "lora.rank=2", "evaluation.max_samples=0", "checkpoints.interval=2ba"]
    run(load(path, [*fixed, "max_duration=4ba", *options]))
    return folder / name


@pytest.mark.slow
def test_a_run_saves_adapters_alone_resumes_exactly_and_merges(
    workplace: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_base = shutil.copytree(base, tmp_path / "base")
    straight = lora_run(workplace, own_base, tmp_path, "straight")
    saved = saved_tensors(straight / "checkpoints" / "ba4")
    assert all("lora" in name or "norm" in name.split(".")[-2] for name in saved), "no frozen matrix is in it"
    shutil.copytree(straight, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "ba4")
    broken = lora_run(workplace, own_base, tmp_path, "broken")  # from ba2
    again = saved_tensors(broken / "checkpoints" / "ba4")
    assert all(torch.equal(saved[name], again[name]) for name in saved)

    # generate, consolidate and init_from see the merged weights
    start = load_model(open_weights(base, print))
    model = load_model(open_weights(straight, print))
    own = dict(start.named_parameters())
    for name, weight in model.named_parameters():
        a, b = (f"model.{factor}" for factor in factor_names(name))
        if a in saved:
            added = product(saved[a], saved[b], {"rank": 2, "alpha": 16.0}, 0, weight.shape[0])
            torch.testing.assert_close(weight.detach(), own[name].detach() + added)
            assert not torch.equal(weight, own[name])
        else:
            assert torch.equal(weight, own[name]), name
    consolidate(straight, tmp_path / "merged.safetensors", torch.float32, print)
    flat = load_model(open_weights(tmp_path / "merged.safetensors", print))
    assert all(torch.equal(p, q) for p, q in zip(flat.parameters(), model.parameters(), strict=True))

    assert verify(straight / "checkpoints" / "ba4")[0].tensors > len(saved), "random states too"
    export(straight, tmp_path / "exported", torch.float32, print)
    exported = load_model(open_weights(tmp_path / "exported", print))
    assert all(torch.equal(p, q) for p, q in zip(exported.parameters(), model.parameters(), strict=True))

    command = ["checkpoint", "adapter", str(straight), "--out", str(tmp_path / "adapter")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "experts.safetensors"}
    modes = {path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}
    assert len(modes) == 1, "all may be read by whoever may read one"
    said = CliRunner().invoke(app, ["generate", str(straight), "Hello?", "--chat", "--max-new-tokens", "4"])
    assert said.exit_code == 0, said.output
    assert "Hello?" not in said.output
    with pytest.raises(ValueError, match="exists already"):
        write_adapter(straight, tmp_path / "adapter", print)
    with pytest.raises(ValueError, match="holds no adapters"):
        write_adapter(base, tmp_path / "none", print)

    with pytest.raises(ConfigError, match=r"lora.rank: None here, but .* was saved with 2"):
        run(load(run_yaml(workplace, tmp_path, "straight")))
    with pytest.raises(ConfigError, match=r"lora.alpha: 4.0 here, but .* was saved with 16.0"):
        lora_run(workplace, base, tmp_path, "straight", "lora.alpha=4")

    # The weights in the base run's folder become others
    shutil.rmtree(own_base)
    path = run_yaml(workplace, tmp_path, "base")
    run(load(path, ["max_duration=2ba", "evaluation.max_samples=0", "seed=5"]))
    with pytest.raises(
        ValueError, match=r"its weights are not those that the adapters in .*ba4 were trained"
    ):
        load_model(open_weights(broken, print))
    shutil.rmtree(broken / "checkpoints" / "ba4")
    with pytest.raises(ConfigError, match=r"init_from.path: .*/base: its weights are not those"):
        lora_run(workplace, own_base, tmp_path, "broken")
    shutil.rmtree(own_base)
    with pytest.raises(ValueError, match=r"holds adapters of the weights in .*/base, which is not there"):
        load_model(open_weights(broken, print))


@pytest.mark.slow
def test_adapters_of_attention_have_the_names_of_transformers_modules(
    workplace: Path, base: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    start = load_model(open_weights(base, print))
    start.save_pretrained(tmp_path / "hf")
    for origin, named in ((tmp_path / "hf", str(tmp_path / "hf")), (base, None)):
        name = f"of-{origin.name}"
        folder = lora_run(workplace, origin, tmp_path, name, "lora.targets=[Wqkv]", "max_duration=2ba")
        write_adapter(folder, tmp_path / f"{name}-adapter", print)
        about = json.loads((tmp_path / f"{name}-adapter" / "adapter_config.json").read_text())
        assert about["base_model_name_or_path"] == named
    theirs = transformers.DbrxForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype=torch.float32)
    wanted = {
        f"base_model.model.{name}.lora_{factor}.weight": shape
        for name, module in theirs.named_modules()
        if name.endswith(".Wqkv")
        for factor, shape in (("A", (2, module.in_features)), ("B", (module.out_features, 2)))
    }
    saved = load_file(tmp_path / f"{name}-adapter" / "adapter_model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in saved.items()} == wanted


@pytest.mark.slow
def test_peft_reads_the_adapters_of_attention(workplace: Path, base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    transformers = pytest.importorskip("transformers")
    options = ("lora.targets=[Wqkv,out_proj]", "precision=amp_bf16")
    start = load_model(open_weights(base, print))
    start.save_pretrained(tmp_path / "hf")
    folder = lora_run(workplace, tmp_path / "hf", tmp_path, "attention", *options)
    files = write_adapter(folder, tmp_path / "adapter", print)
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    theirs = transformers.DbrxForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype=torch.float32)
    before = theirs(TOKENS).logits
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    ours = load_model(open_weights(folder, print))
    logits = theirs(TOKENS).logits
    assert (logits - before).abs().max() > 1e-3
    torch.testing.assert_close(ours(TOKENS).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_configuration_of_adapters_is_checked(tmp_path: Path) -> None:
    path = run_yaml(tmp_path, tmp_path, "wrong")
    for options, says in (
        (["lora.rank=2"], "lora.rank: adapters stand beside weights; say whose with init_from.path"),
        (["lora.rank=0"], "lora.rank: must be at least 1 or null, not 0"),
        (["lora.targets=[w3]"], "lora.targets: 'w3' is not one of Wqkv"),
        (["lora.alpha=-1"], "lora.alpha: must be positive"),
    ):
        with pytest.raises(ConfigError, match=says):
            load(path, options)
    assert math.isclose(load(path).lora.alpha, 16.0)
