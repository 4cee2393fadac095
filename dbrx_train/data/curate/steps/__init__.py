"""The steps that a recipe may name, each a dataclass of its options in a file with its like."""

from __future__ import annotations

from dbrx_train.data.curate.step import Step
from dbrx_train.data.curate.steps.c4 import C4
from dbrx_train.data.curate.steps.classifier import Classifier
from dbrx_train.data.curate.steps.code import CodeQuality, License
from dbrx_train.data.curate.steps.decontaminate import Decontaminate
from dbrx_train.data.curate.steps.duplicates import ExactDuplicates, NearDuplicates
from dbrx_train.data.curate.steps.fineweb import FineWeb
from dbrx_train.data.curate.steps.gopher import GopherQuality, GopherRepetition
from dbrx_train.data.curate.steps.language import Language
from dbrx_train.data.curate.steps.normalize import Normalize
from dbrx_train.data.curate.steps.personal_data import PersonalData

__all__ = ["STEPS"]

STEPS: dict[str, type[Step]] = {
    step.name: step
    for step in (
        Normalize,
        Language,
        GopherQuality,
        GopherRepetition,
        C4,
        FineWeb,
        CodeQuality,
        License,
        Classifier,
        PersonalData,
        Decontaminate,
        ExactDuplicates,
        NearDuplicates,
    )
}
"""In the order of the documentation."""
