"""The run's YAML: its schema as dataclasses, and the one way to read it."""

from dbrx_train.config.errors import ConfigError, naming
from dbrx_train.config.loading import RECORD, flatten, for_record, from_dict, load, to_dict, to_yaml
from dbrx_train.config.run import RunConfig
from dbrx_train.config.sections import BadStepsConfig, LearningRateConfig, OptimizerConfig

__all__ = [
    "RECORD",
    "BadStepsConfig",
    "ConfigError",
    "LearningRateConfig",
    "OptimizerConfig",
    "RunConfig",
    "flatten",
    "for_record",
    "from_dict",
    "load",
    "naming",
    "to_dict",
    "to_yaml",
]
