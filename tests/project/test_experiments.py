"""Experiments: their YAML, the runs that are made of it, and what is said of the numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from corpora import WORDS_VOCABULARY
from paths import ROOT
from tiny_run import saved_tensors
from warm import Warm

from dbrx_train.data.manifest import read_manifest

sys.path.insert(0, str(ROOT / "scripts" / "experiments"))

import corpus
import page
import results
import spec
import training

EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))


def tiny(path: Path, **changes: object) -> Path:
    """An experiment of two arms over the sources of the workplace."""
    given = {
        "title": "Tiny",
        "measure": ["web"],
        "watch": ["code"],
        "baseline": "dense",
        "frontier": ["dense"],
        "seeds": [1, 2],
        "run": {
            "model": {
                "d_model": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": 32,
                "vocab_size": WORDS_VOCABULARY,
            },
            "tokenizer": {"vocab_file": "${variables.data}/words.tiktoken"},
            "data": {
                "seq_len": 32,
                "num_workers": 0,
                "sources": {name: {"local": "${variables.data}/" + name} for name in ("web", "code")},
            },
            "optimization": {"global_batch_size": 2},
            "evaluation": {"interval": "100ba", "max_samples": 2, "at_start": False},
            "logging": {"interval": "1ba", "progress": False, "peak_flops": 1e12},
        },
        "budgets": {
            "cpu": {
                "corpus": {"ranks": 300, "seq_len": 32},
                "steps": [5],
                "warmup": 1,
                "tuning": {"lr": [1e-2], "steps": 5, "seed": 9},
                "arms": {
                    "moe": {"model": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 7}},
                    "dense": {"model": {"num_experts": 1, "top_k": 1, "ffn_hidden_size": 14}},
                },
            }
        },
    }  # fmt: skip
    given |= changes
    path.write_text(yaml.safe_dump(given, sort_keys=False))
    return path


class Shop(training.Workshop):
    """Whose runs are forks; ``made`` is what each of them said."""

    def __init__(self, folder: Path, data: Path, warm: Warm) -> None:
        self.made: dict[str, str] = {}

        def train(config: Path) -> int:
            code, self.made[config.stem] = warm("train", str(config))
            assert code == 0, self.made[config.stem]
            return code

        super().__init__(folder, data, train)


@pytest.mark.slow
def test_all_arms_are_trained_once_and_a_longer_run_goes_on_from_a_shorter_one(
    warm: Warm, workplace: Path, tmp_path: Path
) -> None:
    experiment = spec.read(tiny(tmp_path / "tiny.yaml"))
    budget = experiment.budgets["cpu"]
    shop = Shop(tmp_path / "runs", workplace, warm)
    training.train_all(experiment, budget, shop)
    assert len(shop.made) == 2 + 2 * 2  # a learning rate for each arm, then arms and seeds
    training.train_all(experiment, budget, shop)
    assert len(shop.made) == 6

    rows = results.collect(experiment, budget, shop)
    assert {(r.part, r.arm, r.seed) for r in rows} == {
        *(("tuning", arm, 9) for arm in ("moe", "dense")),
        *(("final", arm, seed) for arm in ("moe", "dense") for seed in (1, 2)),
    }
    assert {r.tokens for r in rows} == {5 * 2 * 32}
    assert {r.metric for r in rows if r.arm == "moe" and r.part == "final"} == {
        "loss/web", "loss/code", "load/entropy", "load/largest", "load/dead",
    }  # fmt: skip
    results.write(tmp_path / "tiny.csv", rows)
    assert results.load(tmp_path / "tiny.csv") == rows

    short = spec.make_run(experiment, budget, "moe", 1e-2, 1, 5)
    long = spec.make_run(experiment, budget, "moe", 1e-2, 1, 10)
    assert shop.result(short) is not None
    shop.finish(lambda: [long])
    assert (
        f"{long.name} goes on from {shop.folder / long.name / 'checkpoints' / 'ba4'}, "
        in shop.made[long.name]
    )
    afresh = Shop(tmp_path / "afresh", workplace, warm)
    afresh.finish(lambda: [long])
    assert "goes on from" not in afresh.made[long.name]
    branched, whole = (
        saved_tensors(one.folder / long.name / "checkpoints" / "ba10") for one in (shop, afresh)
    )
    assert branched.keys() == whole.keys()
    assert all(torch.equal(branched[name], whole[name]) for name in whole)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_run_of_an_experiment_is_a_configuration(path: Path, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from dbrx_train.config import from_dict

    experiment = spec.read(path)
    assert set(experiment.budgets) == {"cpu", "gpu"}
    for budget in experiment.budgets.values():
        rates = dict.fromkeys(budget.arms, budget.tuning.lr[0])
        runs = list(spec.final_runs(experiment, budget, rates))
        assert len({run.name for run in runs}) == len(budget.arms) * len(budget.steps) * len(experiment.seeds)
        for run in runs[: len(budget.arms)]:
            own = {"run_name": run.name, "variables": {"data": "data"}}
            whole = OmegaConf.to_container(OmegaConf.merge(run.config, own), resolve=True)
            assert isinstance(whole, dict)
            whole.pop("variables")
            config = from_dict(whole)
            assert (
                config.clock.total_tokens
                == run.steps * config.optimization.global_batch_size * config.data.seq_len
            )
            assert set(experiment.measure) <= set(config.data.sources)


def test_arms_of_the_grain_have_equal_parameters_and_the_twin_is_one() -> None:
    def models(name: str) -> list[dict[str, int]]:
        experiment = spec.read(ROOT / "experiments" / f"{name}.yaml")
        return [arm["model"] for budget in experiment.budgets.values() for arm in budget.arms.values()]

    def active(model: dict[str, int]) -> int:
        return model["top_k"] * model["ffn_hidden_size"]

    grain = models("grain")
    for size in (grain[:4], grain[4:]):
        assert len({active(model) for model in size}) == 1
        assert len({model["num_experts"] * model["ffn_hidden_size"] for model in size}) == 1
    flops = models("flops")
    for moe, dense in ((flops[0], flops[1]), (flops[3], flops[4])):
        assert active(moe) == active(dense)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sedes": [1]}, "sedes: unknown key; must be one of title, "),
        ({"baseline": "dens"}, "baseline: dens is no arm of budgets.cpu; must be one of moe, dense"),
        ({"seeds": "1"}, "seeds: '1' is no list[int]"),
        ({"seeds": [9]}, "budgets.cpu.tuning.seed: 9 is one of seeds; must be another"),
        ({"budgets": {}}, "budgets: must be a mapping of keys"),
        ({"budgets": {"cpu": {"steps": [5]}}}, "budgets.cpu.warmup: missing"),
    ],
)
def test_a_wrong_experiment_is_refused_in_one_line(
    changes: dict[str, object],
    said: str,
    tmp_path: Path,
    cli: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tiny(tmp_path / "wrong.yaml", **changes)
    assert cli("train", str(path), "--budget", "cpu", "--work", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"experiments: {path}: {said}")


def test_a_missing_budget_is_told(
    tmp_path: Path, cli: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny(tmp_path / "tiny.yaml")
    assert cli("train", str(path), "--budget", "tpu", "--work", str(tmp_path)) == 2
    assert capsys.readouterr().err == f"experiments: {path}: has no budget tpu; must be one of cpu\n"


@pytest.fixture(scope="module")
def cli() -> Callable[..., int]:
    import runpy

    main = runpy.run_path(str(ROOT / "scripts" / "experiments" / "__main__.py"))["main"]
    return lambda *arguments: main(list(arguments))


def test_the_page_is_what_the_curves_in_the_repository_say() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    for path in EXPERIMENTS:
        experiment = spec.read(path)
        for budget in experiment.budgets:
            file = ROOT / "experiments" / "curves" / f"{experiment.name}-{budget}.csv"
            rows = results.load(file) if file.is_file() else []
            content = page.parts(experiment, budget, rows)
            drawn = page.renewed(text, f"{experiment.name} {budget}", content)
            assert drawn == text, "run: python scripts/experiments draw"
            assert not rows or page.picture(experiment, budget).is_file()


def row(arm: str, steps: int, seed: int, loss: float, flops_per_token: int = 1) -> results.Row:
    return results.Row("final", arm, 1e-2, seed, steps, flops_per_token, 9, 8, "loss/web", 100 * steps, loss)


def test_redrawn_from_rows_alone(tmp_path: Path) -> None:
    experiment = spec.read(tiny(tmp_path / "tiny.yaml", watch=[]))
    rows = [
        row(arm, steps, seed, 4 - steps / 10 - seed / 100 - (arm == "moe") / 20)
        for arm in ("moe", "dense")
        for steps in (1, 2, 4)
        for seed in (1, 2)
    ]
    content = page.parts(experiment, "cpu", rows)
    assert (
        "| `moe` | 0.00M (0.00M) | 0.00M | 1.00e+02 | 3.835 ± 0.007 | -0.050 [-0.050, -0.050] | 2 |"
        in content
    )
    assert "| `moe` | 1 | wider or trained longer | 1.26x, 1.26x | 1.26x [1.26, 1.26] |" in content
    assert "| `moe` | 4 | wider or trained longer |  | dense runs are missing |" in content
    page.draw(experiment, "cpu", rows, tmp_path / "first.svg")
    page.draw(experiment, "cpu", rows, tmp_path / "second.svg")
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()
    assert "Not run yet" in page.parts(experiment, "cpu", [])


def test_rows_that_are_none_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    results.write(path, [row("moe", 1, 1, 3.0)])
    path.write_text(path.read_text() + "final,moe,much\n")
    with pytest.raises(ValueError, match=r"rows\.csv:3: is no row of part, arm"):
        results.load(path)


def test_the_bootstrap_of_few_values_is_over_all_resamples() -> None:
    # Means of the 27 resamples of 0, 1, 5: 0 once, 1/3 thrice, ... 11/3 thrice, 5 once.
    low, high = results.bootstrap([0.0, 1.0, 5.0], level=0.8)
    assert (low, high) == (pytest.approx(1 / 3), pytest.approx(11 / 3))
    assert results.bootstrap([2.0, 2.0]) == (2.0, 2.0)
    assert all(map(math.isnan, results.bootstrap([1.0])))


def test_the_bootstrap_of_many_values_covers_what_the_normal_distribution_says() -> None:
    values = list(torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist())
    mean, error = sum(values) / 400, torch.tensor(values).std().item() / 20
    low, high = results.bootstrap(values)
    assert low == pytest.approx(mean - 1.96 * error, abs=error / 8)
    assert high == pytest.approx(mean + 1.96 * error, abs=error / 8)


def test_flops_to_reach_a_loss_lie_on_the_hull_of_the_runs() -> None:
    points = [(100.0, 4.0), (400.0, 3.0), (200.0, 5.0)]  # the last is worse than a cheaper one
    assert results.flops_to_reach(3.5, points) == pytest.approx(200.0)
    assert results.flops_to_reach(4.0, points) == pytest.approx(100.0)
    assert results.flops_to_reach(3.0, points) == pytest.approx(400.0)
    assert results.flops_to_reach(2.9, points) == math.inf
    hollow = [(100.0, 4.0), (200.0, 3.9), (225.0, 3.0)]  # the second lies above the line of the others
    assert results.flops_to_reach(3.5, hollow) == pytest.approx(150.0)
    assert results.flops_to_reach(4.1, points) == 0.0


def test_differences_are_of_seeds_that_both_have() -> None:
    rows = [row("moe", 1, 1, 3.0), row("moe", 1, 2, 3.5), row("moe", 1, 3, 9.0)]
    finals = results.Finals([*rows, row("dense", 1, 1, 3.2), row("dense", 1, 2, 3.6)], ["web"])
    assert results.differences(finals, "moe", "dense", 1) == [pytest.approx(-0.2), pytest.approx(-0.1)]


def test_the_corpus_holds_packages_out_and_has_no_text_twice(tmp_path: Path) -> None:
    names = [f"package{i}" for i in range(60)]
    held = [name for name in names if corpus.is_held_out(name)]
    assert held
    assert corpus.is_held_out(held[0].upper())
    kept = next(name for name in names if name not in held)
    for name in names:
        (tmp_path / name).mkdir()
        for module in range(8):
            text = f'"""Module {module} of {name}."""\n' + f"{name}_{module} = 1\n" * 40
            (tmp_path / name / f"{module}.py").write_text(text)
    shared = "shared = 1\n" * 40
    for name in (kept, held[0]):
        (tmp_path / name / "shared.py").write_text(shared)
    found = corpus.chosen([tmp_path], per_package=100_000)
    assert {d["package"] for d in found["code_heldout"]} <= set(held)
    assert not {d["package"] for d in found["code"]} & set(held)
    texts = [d["text"] for documents in found.values() for d in documents]
    assert len(texts) == len(set(texts))
    few = corpus.chosen([tmp_path], per_package=1500)["code"]
    sizes = [sum(len(d["text"]) for d in few if d["package"] == name) for name in names if name not in held]
    assert min(sizes) > 0
    assert max(sizes) <= 1500


def test_the_corpus_is_made_once(tmp_path: Path) -> None:
    root = tmp_path / "site-packages"
    held = next(f"package{i}" for i in range(99) if corpus.is_held_out(f"package{i}"))
    for name in (held, "torch"):
        (root / name).mkdir(parents=True)
        for module in range(200):  # 2 % of a held-out package are its train, which it must have
            (root / name / f"{module}.py").write_text(f"{name}_{module} = 1\n" * 40)
    for _ in range(2):
        corpus.make(tmp_path / "corpus", ranks=1024, seq_len=16, roots=[root])
    splits = [read_manifest(tmp_path / "corpus" / name).splits for name in ("code", "code_heldout")]
    assert splits[0].keys() == {"train"}
    assert splits[1]["val"].documents > 0


def test_a_vocabulary_cut_to_some_ranks_trains_small_models(tmp_path: Path) -> None:
    from dbrx_train.data.tokenizer import load_tokenizer

    file = tmp_path / "vocabulary.tiktoken"
    corpus.cut_vocabulary(1024, file)
    tokenizer = load_tokenizer(vocab_file=str(file))
    assert tokenizer.vocab_size == 1152
    assert tokenizer.eos_id == 1024
    assert tokenizer.decode(tokenizer.encode("def f(x): return x")) == "def f(x): return x"
