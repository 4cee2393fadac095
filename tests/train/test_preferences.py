"""Direct preference optimisation: its loss, its gradient, and a run that learns to prefer."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import prepare_pairs, words
from parallel_ranks import CONFIG as SIZES
from tiny_run import mlflow_run, run_yaml, saved_tensors
from warm import Warm

from dbrx_train.config import ConfigError, load
from dbrx_train.model.decoder import Dbrx
from dbrx_train.model.documents import document_starts
from dbrx_train.model.loss import chunked_log_probs
from dbrx_train.train import reference
from dbrx_train.train.composer_model import ComposerDbrx
from dbrx_train.train.preferences import TERMS, document_log_probs
from dbrx_train.train.run import run

CONFIG = replace(SIZES, num_experts=4, balance_loss_weight=0.05, loss_chunk_size=7)


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_log_probs_and_their_gradients_are_those_of_the_whole_softmax(chunk_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, 8, generator=generator, dtype=torch.float64, requires_grad=True) for n in (17, 31)
    )
    labels = torch.randint(31, (17,), generator=generator)
    labels[::4] = -100
    found = chunked_log_probs(hidden.float(), weight.float(), labels, chunk_size)
    wanted = (hidden @ weight.T).log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    wanted = wanted.where(labels >= 0, 0.0)
    torch.testing.assert_close(found, wanted.float())
    pull = torch.randn(17, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((found * pull.float()).sum(), (hidden, weight))
    theirs = torch.autograd.grad((wanted * pull).sum(), (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def batch_of_pairs() -> dict[str, torch.Tensor]:
    """Two samples: one with two pairs, one with one and padding; answers are the later half of a document."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(101, (2, 24), generator=generator)
    documents = torch.tensor([[0] * 6 + [1] * 5 + [2] * 7 + [3] * 6, [0] * 8 + [1] * 9 + [-1] * 7])
    labels = tokens.clone()
    for row in range(2):
        for number in range(4):
            places = (documents[row] == number).nonzero()[:, 0]
            labels[row, places[: len(places) // 2]] = -100
    labels[documents == -1] = -100
    reference = torch.tensor([[-9.0, -8.0, -15.0, -20.0], [-14.0, -16.0, np.nan, np.nan]])
    return {
        "input_ids": tokens,
        "labels": labels,
        "document_ids": documents,
        "document_starts": document_starts(documents),
        "reference": reference,
    }


def test_the_loss_and_every_gradient_are_those_of_the_formula_in_float64() -> None:
    batch, beta = batch_of_pairs(), 0.3
    model, plain = Dbrx(CONFIG, seed=3), Dbrx(CONFIG, seed=3).double()
    output = ComposerDbrx(model, beta=beta)(batch)
    sums = torch.zeros(2, 4, dtype=torch.float64)
    for row, number in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)):
        places = batch["document_ids"][row] == number
        tokens, labels = batch["input_ids"][row][places], batch["labels"][row][places]
        log_probs = plain(tokens[None]).logits[0].log_softmax(-1)  # each document alone
        sums[row, number] = sum(
            log_probs[t - 1, tokens[t]] for t in range(1, len(tokens)) if labels[t] != -100
        )
    margins = (sums - batch["reference"]).view(2, 2, 2)
    margins = beta * (margins[..., 0] - margins[..., 1])[torch.tensor([[True, True], [True, False]])]
    dpo = -torch.log(1 / (1 + torch.exp(-margins))).mean()
    assert float(output.losses["dpo"]) == pytest.approx(float(dpo), rel=1e-5)
    assert float(output.losses["reward_margin"]) == pytest.approx(float(margins.mean()), rel=1e-4)
    assert float(output.losses["reward_accuracy"]) == pytest.approx(float((margins > 0).double().mean()))
    chosen = torch.stack([sums[0, 0], sums[0, 2], sums[1, 0]]).mean()
    assert float(output.losses["log_prob_chosen"]) == pytest.approx(float(chosen), rel=1e-5)

    # Balance is a loss of all tokens together, so it is left out of the comparison.
    model.config.balance_loss_weight = 0.0
    ComposerDbrx(model, beta=beta)(batch).loss.backward()
    dpo.backward()
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        wanted = torch.zeros_like(other) if other.grad is None else other.grad
        torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-3, atol=1e-6, msg=name)


def test_sums_over_documents_stay_float32_under_autocast() -> None:
    log_probs = -9 * torch.rand(2, 24, generator=torch.Generator().manual_seed(2))
    documents = batch_of_pairs()["document_ids"]
    plain = document_log_probs(log_probs, documents, 4)
    for number in range(4):
        torch.testing.assert_close(plain[:, number], log_probs.where(documents == number, 0.0).sum(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = document_log_probs(log_probs, documents, 4)
    assert found.dtype == torch.float32
    assert torch.equal(found, plain)


@pytest.fixture(scope="module")
def pairs(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared preferences for one word over another, and a run to begin from: ``pairs``, ``base``."""
    root = tmp_path_factory.mktemp("preferences")
    prepare_pairs(root, words(root))
    run(load(run_yaml(workplace, root, "base"), ["max_duration=2ba", "evaluation.max_samples=0"]))
    return root


def options(root: Path, *more: str) -> list[str]:
    return [
        f"init_from.path={root / 'base'}",
        f"data.sources={{pairs: {{local: {root / 'pairs'}}}}}",
        "data.mix=[]",
        "data.seq_len=64",
        "preferences.beta=0.5",
        "optimization.optimizer.lr=3e-3",
        "evaluation.max_samples=16",
        "evaluation.interval=8ba",
        *more,
    ]


def without_sources(path: Path) -> Path:
    """The run's YAML with no sources of its own, as overrides only add to a mapping."""
    lines = [line for line in path.read_text().splitlines() if "sources:" not in line]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_a_run_learns_to_prefer_and_resumes_with_the_reference_that_it_had(
    workplace: Path, pairs: Path, tmp_path: Path
) -> None:
    def again(name: str) -> Path:
        run(load(without_sources(run_yaml(workplace, tmp_path, name)), options(pairs)))
        return tmp_path / name / "checkpoints" / "ba8"

    straight = saved_tensors(again("prefer"))
    client, found = mlflow_run(workplace, "prefer")
    history = {
        term: [m.value for m in client.get_metric_history(found.info.run_id, f"loss/train/{term}")]
        for term in TERMS
    }
    assert history["dpo"][0] == pytest.approx(np.log(2), rel=1e-4), "at first it is the reference"
    assert history["reward_margin"][0] == pytest.approx(0, abs=1e-3)
    assert history["reward_margin"][-1] > 1
    assert history["reward_accuracy"][-1] == 1
    assert history["dpo"][-1] < 0.4
    held_out = client.get_metric_history(found.info.run_id, "metrics/eval/pairs/reward_margin")
    assert held_out[0].value == pytest.approx(0, abs=1e-3)
    assert held_out[-1].value > 1
    accuracy = client.get_metric_history(found.info.run_id, "metrics/eval/pairs/reward_accuracy")
    assert accuracy[-1].value == 1

    shutil.copytree(tmp_path / "prefer", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "ba8")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "ba6")
    table = tmp_path / "broken" / "reference" / "pairs-train.npy"
    written = table.stat().st_mtime_ns
    resumed = saved_tensors(again("broken"))
    assert table.stat().st_mtime_ns == written
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    table.unlink()
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "ba8")
    with pytest.raises(ConfigError, match=r"pairs-train.npy: what the first model made of the data cannot"):
        again("broken")


@pytest.mark.slow
def test_an_answer_without_a_finite_log_probability_is_refused_by_its_sample(
    workplace: Path, pairs: Path, tmp_path: Path
) -> None:
    path = without_sources(run_yaml(workplace, tmp_path, "broken"))
    with pytest.MonkeyPatch.context() as patch:
        wrong = partial(torch.full, fill_value=-torch.inf)
        patch.setattr(reference, "document_log_probs", lambda rows, _, count: wrong((len(rows), count)))
        with pytest.raises(ConfigError, match=r"data.sources.pairs: an answer in sample 0 of .*/pairs/train"):
            run(load(path, options(pairs)))


@pytest.mark.slow
def test_pairs_count_alike_however_ranks_and_microbatches_divide_them(
    workplace: Path, pairs: Path, tmp_path: Path, warm: Warm
) -> None:
    path = without_sources(run_yaml(workplace, tmp_path, "alone"))
    few = options(pairs, "max_duration=2ba", "lora.rank=4", "evaluation.max_samples=3")
    few.append("model.balance_loss_weight=0")  # it is of a microbatch's own tokens
    run(load(path, [*few, "optimization.microbatch_size=4"]))
    run(load(path, [*few, "optimization.microbatch_size=1", "run_name=singly", f"folder={tmp_path}/singly"]))
    codes, said = warm.ranks(
        "train", str(path), *few, "run_name=both", f"folder={tmp_path}/both", ranks=2, cwd=str(tmp_path)
    )
    assert codes == [0, 0], said
    alone = saved_tensors(tmp_path / "alone" / "checkpoints" / "ba2")
    table = np.load(tmp_path / "alone" / "reference" / "pairs-train.npy")
    assert len(set((~np.isnan(table)).sum(1))) > 1, "samples differ in how many pairs they have"
    for other in ("singly", "both"):
        found = np.load(tmp_path / other / "reference" / "pairs-train.npy")
        np.testing.assert_allclose(found, table, rtol=1e-4)
        weights = saved_tensors(tmp_path / other / "checkpoints" / "ba2")
        for name in alone:
            torch.testing.assert_close(weights[name], alone[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_data_of_another_kind_is_refused(workplace: Path, pairs: Path, tmp_path: Path) -> None:
    path = without_sources(run_yaml(workplace, tmp_path, "kind"))
    with pytest.raises(ConfigError, match=r"data.sources.pairs: .* holds preferences; set preferences.beta"):
        run(load(path, options(pairs, "preferences.beta=null")))
    with pytest.raises(ConfigError, match=r"data.sources.pairs: .* holds conversations, to be kept apart"):
        run(load(path, options(pairs, "model.mask_documents=false")))
    whole = run_yaml(workplace, tmp_path, "kind")
    with pytest.raises(ConfigError, match=r"data.sources.web: .* holds no preferences, which"):
        run(load(whole, ["preferences.beta=0.1", f"init_from.path={pairs / 'base'}"]))
    without_sources(path)
    with pytest.raises(ConfigError, match=r"preferences.beta: needs a model whose answers to compare"):
        load(path, options(pairs, "init_from.path=null"))
    with pytest.raises(ConfigError, match=r"model.output_z_loss_weight: is of next-token prediction; pref"):
        load(path, options(pairs, "model.output_z_loss_weight=0.1"))
    with pytest.raises(ConfigError, match=r"preferences.beta: must be positive or null, not 0"):
        load(path, options(pairs, "preferences.beta=0"))
