"""In-context tasks as LLM Foundry's YAML lists them: what is asked, of which file, with how many shots."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dbrx_train.config.errors import nearest, where_and_what
from dbrx_train.options import check, option

__all__ = ["GAUNTLET", "METRICS", "TASKS", "Task", "read_tasks", "select"]

_HERE = Path(__file__).parent / "gauntlet_v0_3"
TASKS, GAUNTLET = _HERE / "tasks.yaml", _HERE / "gauntlet.yaml"
"""Gauntlet v0.3 as LLM Foundry publishes it (Apache-2.0), without its data."""
_MORE = Path(__file__).parent / "more_tasks" / "tasks.yaml"

METRICS = {
    "multiple_choice": "InContextLearningMultipleChoiceAccuracy",
    "schema": "InContextLearningMultipleChoiceAccuracy",
    "language_modeling": "InContextLearningLMAccuracy",
    "generation_task_with_answers": "InContextLearningGenerationExactMatchAccuracy",
    "code_evaluation": "InContextLearningCodeEvalAccuracy",
}
"""Task type -> the metric of its score, by LLM Foundry's names."""
_PUBLISHED_IN = "local_data/"


@dataclass(kw_only=True)
class Task:
    """A data set and how its rows become prompts; keys and defaults are LLM Foundry's."""

    label: str = option("the task's name")
    dataset_uri: str = option("a JSONL file")
    icl_task_type: str = option("what is scored", one_of=tuple(METRICS))
    num_fewshot: list[int] = option("solved examples ahead of each; several numbers are evaluated in turn")
    metric_names: list[str] = option("must be the type's own", list)
    has_categories: bool = option("score each `category` of rows apart, and average over them alike", False)
    max_seq_len: int | None = option(
        "tokens of the longest prompt with answer; null: the model's", None, gt=1
    )
    prompt_string: str = option("text ahead of everything", "")
    example_delimiter: str = option("text between examples", "\n")
    continuation_delimiter: str = option("text between a context and its answer", " ")
    prelimiter: str = option("text ahead of every context; also `question_prelimiter`", "")
    fewshot_random_seed: int = option("seed of the choice of shots", 1234)
    strip_dataset: bool = option("strip white space around texts", True)
    cot_delimiter: str = option("text between a chain of thought and the answer", "")
    early_stopping_criteria: list[str] = option("texts that end a generated answer", list)
    do_normalization: bool = option("compare answers without case, articles and punctuation", True)
    context_key: str | None = option("the field with the context; null: the type's", None)
    answer_key: str | None = option("the field with the answer; null: the type's", None)
    choices_key: str | None = option("the field with the choices; null: the type's", None)
    generations_per_sample: int = option("answers to each; the commonest counts, or see pass_at_k", 1, ge=1)
    pass_at_k: int = option("of a program: the probability that one of so many passes", 1, ge=1)
    temperature: float = option("of generated answers; 0: the likeliest tokens", 0.0, ge=0)
    top_p: float = option("probability to draw tokens from", 1.0, ge=0, le=1)
    batch_size: int | None = option("not used: batches are made by tokens", None)

    def check(self) -> None:
        for name in self.metric_names:
            if name != self.metric:
                raise ValueError(
                    f"metric_names: {name!r} is not known for {self.icl_task_type}; use {self.metric}"
                )
        for shots in self.num_fewshot:
            if shots < 0:
                raise ValueError(f"num_fewshot: must not be negative, not {shots}")
        if self.generations_per_sample > 1 and self.temperature == 0:
            raise ValueError("generations_per_sample: all would be alike; give a temperature above 0")
        if self.pass_at_k > self.generations_per_sample:
            raise ValueError(
                f"pass_at_k: must be at most generations_per_sample {self.generations_per_sample}, "
                f"not {self.pass_at_k}"
            )

    @property
    def metric(self) -> str:
        return METRICS[self.icl_task_type]

    @property
    def is_choice(self) -> bool:
        """Whether the model chooses among what is given."""
        return self.icl_task_type in ("multiple_choice", "schema")

    @property
    def is_written(self) -> bool:
        """Whether the model writes an answer."""
        return self.icl_task_type in ("generation_task_with_answers", "code_evaluation")

    @property
    def is_code(self) -> bool:
        """Whether what it writes is run."""
        return self.icl_task_type == "code_evaluation"

    def name(self, shots: int) -> str:
        """The task with so many shots, as results are labelled."""
        return f"{self.label}/{shots}-shot"


_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "str | None": str,
    "int": int,
    "int | None": int,
    "bool": bool,
    "float": (int, float),
    "list[int]": list,
    "list[str]": list,
}


def read_tasks(path: Path, data: Path | None = None) -> list[Task]:
    """The tasks in a file with ``icl_tasks:``, with the paths of their data as they are found.

    A ``dataset_uri`` is looked for from here, from the folder ``data`` (default: that of ``path``), and there
    once more without what LLM Foundry has up to ``local_data/``. Those that are not there stay as they are.

    Raises:
        ValueError: the file is no such list, or a task in it is wrong; one line with file and line.
    """
    try:
        tree = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        line, problem = where_and_what(error)
        raise ValueError(f"{path}{line}: not valid YAML: {problem}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no text in UTF-8") from None
    entries = _entries(tree)
    if not entries:
        raise ValueError(f"{path}: has no list of tasks; must be a mapping with icl_tasks:")
    tasks = [_task(entry, path) for entry in entries]
    seen = set[str]()
    for task, entry in zip(tasks, entries, strict=True):
        for shots in task.num_fewshot:
            if (name := task.name(shots)) in seen:
                raise ValueError(f"{_place(entry, path)}: {name} is there already; labels must differ")
            seen.add(name)
        task.dataset_uri = str(_find(task.dataset_uri, data or path.parent))
    return tasks


def _entries(tree: yaml.Node | None) -> list[yaml.Node]:
    if isinstance(tree, yaml.MappingNode):
        for key, value in tree.value:
            if key.value == "icl_tasks" and isinstance(value, yaml.SequenceNode):
                return list(value.value)
    return []


def _place(node: yaml.Node, path: Path) -> str:
    return f"{path}, line {node.start_mark.line + 1}"


def _task(node: yaml.Node, path: Path) -> Task:
    given = yaml.SafeLoader("")
    values = given.construct_document(node)
    where = _place(node, path)
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a task is a mapping of keys, such as label and dataset_uri")
    known = {field.name: str(field.type) for field in dataclasses.fields(Task)}
    lines = {key.value: _place(key, path) for key, _ in node.value}
    if "question_prelimiter" in values:
        if "prelimiter" in values:
            raise ValueError(
                f"{lines['prelimiter']}: prelimiter and question_prelimiter are the same; give one"
            )
        values["prelimiter"] = values.pop("question_prelimiter")
        lines["prelimiter"] = lines["question_prelimiter"]
    if isinstance(values.get("num_fewshot"), int):
        values["num_fewshot"] = [values["num_fewshot"]]
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{lines[key]}: unknown key {key}{nearest(str(key), known)}")
        if value is not None or "None" not in known[key]:
            _check_type(key, value, known[key], lines[key])
    for key in ("label", "dataset_uri", "icl_task_type", "num_fewshot"):
        if not values.get(key):
            raise ValueError(f"{where}: lacks {key}")
    if values["icl_task_type"] == "code_evaluation":  # of which white space is a part
        values = {"continuation_delimiter": "", "strip_dataset": False} | values
    task = Task(**values)
    try:
        check(task)
    except ValueError as error:
        key = str(error).partition(":")[0]
        raise ValueError(f"{lines.get(key, where)}: {error}") from None
    return task


def _check_type(key: str, value: Any, declared: str, where: str) -> None:
    item = {"list[int]": int, "list[str]": str}.get(declared)
    fits = isinstance(value, _TYPES[declared]) and (isinstance(value, bool) == (declared == "bool"))
    if not fits or (item and not all(isinstance(each, item) for each in value)):
        raise ValueError(f"{where}: {key} must be {declared.removesuffix(' | None')}, not {value!r}")


def _find(uri: str, data: Path) -> Path:
    given = Path(uri)
    candidates = [given, data / given]
    if _PUBLISHED_IN in uri:
        candidates.append(data / uri.partition(_PUBLISHED_IN)[2])
    return next((path for path in candidates if path.is_file()), given)


def select(asked: Sequence[str], data: Path | None) -> list[Task]:
    """The tasks that a user asks for: files, ``gauntlet``, and labels in these; without files, labels of the
    Gauntlet and of what there is beside it.

    Raises:
        ValueError: as ``read_tasks``, and for a label that is not there.
    """
    files = [Path(name) for name in asked if name.endswith((".yaml", ".yml"))]
    labels = [name for name in asked if Path(name) not in files and name != "gauntlet"]
    if "gauntlet" in asked:
        files.append(TASKS)
    if not files:
        files = [TASKS, _MORE] if labels else [TASKS]
    tasks = [task for path in files for task in read_tasks(path, data)]
    _check_labels(labels, tasks)
    return [task for task in tasks if not labels or task.label in labels]


def _check_labels(labels: Iterable[str], tasks: Sequence[Task]) -> None:
    known = [task.label for task in tasks]
    for label in labels:
        if label not in known:
            raise ValueError(f"no task is called {label}{nearest(label, known)}")
