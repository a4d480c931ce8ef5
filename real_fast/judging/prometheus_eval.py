"""Stands in for the package prometheus-eval: change its imports to this module, and its model to yours.

from real_fast.judging.prometheus_eval import ABSOLUTE_PROMPT, SCORE_RUBRIC_TEMPLATE, VLLM, PrometheusEval
"""

from __future__ import annotations

from collections.abc import Iterable
from inspect import signature
from typing import Any

from real_fast.config import ScaleConfig
from real_fast.errors import ConfigError
from real_fast.judging.arguments import refuse_unknown
from real_fast.judging.grade import Grade
from real_fast.judging.judge import Judge
from real_fast.judging.prometheus_names import PrometheusNames
from real_fast.model.judge_settings import trained_settings
from real_fast.types import SamplingParams

# A judge is asked in the words that it was trained with, so these stand for its own prompt, whichever is given.
ABSOLUTE_PROMPT = "the judge's own prompt, with a reference answer"
ABSOLUTE_PROMPT_WO_REF = "the judge's own prompt, without a reference answer"
RELATIVE_PROMPT = "the judge's own prompt for each of two responses, with a reference answer"
RELATIVE_PROMPT_WO_REF = "the judge's own prompt for each of two responses, without a reference answer"
_PROMPTS = (ABSOLUTE_PROMPT, ABSOLUTE_PROMPT_WO_REF, RELATIVE_PROMPT, RELATIVE_PROMPT_WO_REF)

# For str.format: a rubric of five descriptions as one text.
SCORE_RUBRIC_TEMPLATE = "\n".join(["[{criteria}]", *(f"Score {s}: {{score{s}_description}}" for s in range(1, 6))])

# prometheus-eval's own where nothing else is given.
_ROLLOUT = {"max_tokens": 1024, "top_p": 0.9}
# What its own models were trained with; a model of real_fast.train says this of itself.
_PROMETHEUS = {"prompt": {"template": "prometheus", "system": ""}, "scale": ScaleConfig(phrase="[RESULT] ")}


class VLLM:
    """Which model to judge with; :class:`PrometheusEval` loads it.

    One that real_fast.train wrote is asked as it was trained; another, as Prometheus's models are.

    Args:
        model: A folder or a model on the Hugging Face hub.
        settings: Arguments of :class:`Judge` (engine, n, prompt, ...; the engine need not be vLLM). Of vLLM's own,
            gpu_memory_utilization, and tensor_parallel_size where it is 1.

    Raises:
        ConfigError: More than one GPU, or a setting that a judge does not have.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        if settings.pop("tensor_parallel_size", 1) != 1:
            raise ConfigError("tensor_parallel_size is not 1: a judge runs on one device")
        rollout = {**_ROLLOUT, **settings.pop("rollout", {})}
        if "gpu_memory_utilization" in settings:
            rollout["gpu_memory_utilization"] = settings.pop("gpu_memory_utilization")
        known = sorted(set(signature(Judge).parameters) - {"model"})
        refuse_unknown("VLLM", settings, [*known, "gpu_memory_utilization"])
        self.model, self.settings = model, {**settings, "rollout": rollout}

    def judge(self) -> Judge:
        """Load it. Raises as :class:`Judge` does."""
        own = {} if trained_settings(self.model) else _PROMETHEUS
        return Judge(self.model, **{**own, **self.settings})


class PrometheusEval(PrometheusNames):
    """prometheus-eval's judge: its four grading methods, by a judge of this package.

    Args:
        model: A :class:`VLLM`, a :class:`Judge`, or a folder or hub name.
        absolute_grade_template: :data:`ABSOLUTE_PROMPT` or :data:`ABSOLUTE_PROMPT_WO_REF`.
        relative_grade_template: :data:`RELATIVE_PROMPT` or :data:`RELATIVE_PROMPT_WO_REF`.
        model_id: Another name of `model`.

    Raises:
        ConfigError: No model, or a prompt of the caller's own. Beside it, what :class:`Judge` raises.
    """

    def __init__(
        self,
        model: VLLM | Judge | str | None = None,
        absolute_grade_template: str = ABSOLUTE_PROMPT_WO_REF,
        relative_grade_template: str = RELATIVE_PROMPT_WO_REF,
        *,
        model_id: str | None = None,
    ) -> None:
        for name, template in (("absolute", absolute_grade_template), ("relative", relative_grade_template)):
            if template not in _PROMPTS:
                raise ConfigError(
                    f"{name}_grade_template is a text of your own, and a judge is asked in the words that it was "
                    "trained with. For a model without such, give a file: VLLM(model, prompt={'template': 'mine.txt'})"
                )
        given = model if model is not None else model_id
        if given is None:
            raise ConfigError("model is None: give a VLLM, a Judge, or the name of a model")
        if not isinstance(given, Judge):
            given = (given if isinstance(given, VLLM) else VLLM(given)).judge()
        self.judge = given
        self.scale = given.scale

    def _sampling(self, seed: int) -> SamplingParams:
        return self.judge._sampling(seed)

    def _grade(self, rows: Iterable[Any], params: SamplingParams) -> list[Grade]:
        return self.judge._grade(rows, params)
