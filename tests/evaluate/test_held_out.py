"""Held-out loss by command: what the run itself logged, and in 8 bits nearly that."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import mlflow
import pytest
import torch
from tiny_run import run_yaml
from warm import Warm

from dbrx_train.checkpoint.weights import load_model, open_weights
from dbrx_train.config import load
from dbrx_train.data.prepare.conversations import ChatFormat
from dbrx_train.data.prepare.pipeline import prepare
from dbrx_train.evaluate.held_out import held_out, of_weights
from dbrx_train.train.eval_metrics import CrossEntropy, PairMean, Perplexity
from dbrx_train.train.preferences import TERMS
from dbrx_train.train.run import run


@pytest.mark.slow
def test_the_command_gives_the_losses_that_the_run_ended_with(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], warm: Warm
) -> None:
    path = run_yaml(workplace, tmp_path, "evaluated")
    run(load(path))
    said = capsys.readouterr().out
    ended = re.findall(r"held-out (\w+): loss .* ([\d.]+) after 1,024 tokens", said)
    assert len(ended) == 2
    command = ["eval", str(path)]
    for options in ([], ["--int8"]):
        (done,) = warm.apart(*command, *options, ranks=1)
        assert done.code == 0, done.err
        shown = re.findall(r"held-out (\w+): loss ([\d.]+) over [\d,]+ tokens", done.out)
        assert dict(shown).keys() == dict(ended).keys()
        for source, loss in shown:
            assert float(loss) == pytest.approx(float(dict(ended)[source]), abs=0.05 if options else 6e-4)
        assert ("int8: logits are off by" in done.err) == bool(options)
    code, said = warm(*command, "--weights", "nowhere")
    assert code == 2
    assert said.startswith("dbrx-train: nowhere: no such file or folder, seen from")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    code, said = warm("eval", str(tmp_path / "hf"))
    assert code == 2
    assert said.startswith(f"dbrx-train: {tmp_path}/hf: is a Hugging Face folder, which names no held-out ")
    code, said = warm(*command, "evaluation.max_samples=0")
    assert code == 2
    assert "nothing is held out of its sources, or evaluation.max_samples is 0" in said


def test_means_weigh_what_is_counted_and_let_nan_through() -> None:
    for metric in (CrossEntropy(), PairMean("dpo"), Perplexity()):
        for total, count in ((1.0, 1), (9.0, 3), (0.0, 0)):
            metric.update(torch.tensor(total), torch.tensor(count))
        wanted = math.exp(2.5) if isinstance(metric, Perplexity) else 2.5
        assert float(metric.compute()) == pytest.approx(wanted, rel=1e-12)
        metric.update(torch.tensor(math.nan), torch.tensor(2))
        assert math.isnan(metric.compute())


def write_uneven_pairs(path: Path) -> None:
    """Pairs that fill a sample each or share one, with answers of 1 to some 40 tokens."""
    rows = [
        {
            "prompt": f"the model reads {i}",
            "chosen": " ".join(["yes"] * (1 + 7 * i % 23)),
            "rejected": " ".join(["no"] * (1 + 5 * i % 19)),
        }
        for i in range(90)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_held_out_figures_do_not_depend_on_batches_or_ranks(
    workplace: Path, tmp_path: Path, warm: Warm
) -> None:
    """Of the same weights: 17 samples of very unequal labels and pairs, in training and by ``eval``."""
    write_uneven_pairs(tmp_path / "pairs.jsonl")
    form = ChatFormat(preferences=True)
    prepare(
        [str(tmp_path / "pairs.jsonl")],
        str(tmp_path / "pairs"),
        vocab_file=str(workplace / "words.tiktoken"),
        seq_len=64,
        val_fraction=0.5,
        processes=1,
        chat=form,
    )
    run(load(run_yaml(workplace, tmp_path, "base"), ["max_duration=1ba", "evaluation.max_samples=0"]))
    path = run_yaml(workplace, tmp_path, "first")
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "sources:" not in line))
    options = [f"init_from.path={tmp_path}/base", f"data.sources={{pairs: {{local: {tmp_path}/pairs}}}}"]
    options += ["data.mix=[]", "data.seq_len=64", "preferences.beta=0.5", "optimization.microbatch_size=2"]
    options += ["evaluation.interval=1ba", "evaluation.max_samples=17"]
    run(load(path, [*options, "max_duration=1ba"]))

    still = [*options, "max_duration=2ba", "optimization.optimizer.lr=1e-30"]
    config = load(path, still)
    (alone,) = held_out(load_model(open_weights(tmp_path / "first", print)), config)
    store = mlflow.MlflowClient(f"sqlite:///{workplace}/mlruns.db")
    experiment = store.get_experiment_by_name("dbrx-train")
    assert experiment is not None
    seen = dict[tuple[int, int], dict[str, float]]()
    for size, ranks in ((1, 1), (5, 1), (8, 1), (1, 2), (5, 2), (4, 4)):
        name = f"size{size}-ranks{ranks}"
        shutil.copytree(tmp_path / "first", tmp_path / name)
        named = [f"run_name={name}", f"folder={tmp_path}/{name}", f"evaluation.batch_size={size}"]
        named += ["optimization.microbatch_size=1"]
        codes, said = warm.ranks("train", str(path), *still, *named, ranks=ranks)
        assert codes == [0] * ranks, said
        (found,) = store.search_runs([experiment.experiment_id], f"tags.run_name = '{name}'")
        metrics = found.data.metrics
        terms = ("cross_entropy", "perplexity", *TERMS)
        seen[size, ranks] = {term: metrics[f"metrics/eval/pairs/{term}"] for term in terms}
    one = seen[1, 1]
    assert one["cross_entropy"] == pytest.approx(alone.loss, rel=1e-6)
    assert one["perplexity"] == pytest.approx(math.exp(alone.loss), rel=1e-5)
    assert abs(one["reward_margin"]) > 1e-2, "the weights have moved away from the reference"
    for how, figures in seen.items():
        # A margin is a small difference of sums of some 100 nats in float32.
        for term, figure in figures.items():
            loose = {"abs": 3e-5} if term in ("dpo", "reward_margin") else {"rel": 1e-6}
            assert figure == pytest.approx(one[term], **loose), (how, term, figures, one)


def test_a_shape_of_ones_own_is_refused_where_weights_have_theirs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.d_model=64: the weights say what the model is"):
        next(of_weights(tmp_path / "config.yaml", ["model.d_model=64"], None, False, print))
