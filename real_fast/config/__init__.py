"""Every setting of a run, how settings are read and what is checked of them without looking at data or models.

Nothing here knows a method, a model or a file of rows; whoever needs one of these checks settings itself.
"""

from real_fast.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    LoraConfig,
    ObjectiveConfig,
    OptimConfig,
    PromptConfig,
    RolloutConfig,
    SaveConfig,
    ScaleConfig,
    SupervisedConfig,
    TrackerName,
    TrainConfig,
    WarmupConfig,
)

__all__ = [
    "Config",
    "DataConfig",
    "EvalConfig",
    "LoraConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PromptConfig",
    "RolloutConfig",
    "SaveConfig",
    "ScaleConfig",
    "SupervisedConfig",
    "TrackerName",
    "TrainConfig",
    "WarmupConfig",
]
