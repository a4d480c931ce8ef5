"""A judge behind a server that speaks OpenAI's protocol: what to ask it, and the grade out of its answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from typing import Any

from real_fast.config import EvalConfig, PromptConfig, RolloutConfig
from real_fast.data.rows import parse_texts
from real_fast.errors import GradeError
from real_fast.judging.arguments import check_arguments, known_arguments
from real_fast.judging.grade import Grade, verdict
from real_fast.model.judge_settings import judge_config
from real_fast.model.load import load_tokenizer
from real_fast.prompt.builder import PromptBuilder
from real_fast.rollout.checked import ROUNDING, no_distribution
from real_fast.score.scale import ScoreScale
from real_fast.score.verdict import phrases_outside, thought_left_open, written_behind
from real_fast.types import JudgeTexts, Rollout

# Servers give that many of the likeliest tokens at most; vLLM gives the scores' own besides, however unlikely.
_TOP = 20


class ServedJudge:
    """A judge whose model runs elsewhere, under ``vllm serve``, say. Loads settings and the tokenizer, no weights.

    The score is read behind the phrase that the model wrote itself: a feedback without it has no score.

    Args:
        model: The folder, or the model on the Hugging Face hub, that is served.
        scale: As of :class:`real_fast.Judge`, like the following.
        temperature: Sampling temperature of the feedback.
        prompt: How a request becomes a prompt.
        rollout: max_tokens and top_p are used.
        tokenizer: The model's, where it is loaded already.

    Raises:
        ConfigError: An argument or setting that cannot be. Beside it, what loading a tokenizer and a template raises.
    """

    @known_arguments
    def __init__(
        self,
        model: str | PathLike[str],
        *,
        scale: Any = None,
        temperature: float = 1.0,
        prompt: PromptConfig | Mapping[str, Any] | None = None,
        rollout: RolloutConfig | Mapping[str, Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        check_arguments(scale=scale, prompt=prompt, rollout=rollout, temperature=temperature)
        evaluation = EvalConfig(temperature=temperature)
        self.config = config = judge_config(str(model), scale, prompt, rollout, None, "real", evaluation)
        config.validate()
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(str(model))
        self.scale = ScoreScale.from_config(tokenizer, config.scale, config.prompt)
        self._builder = PromptBuilder(config.prompt, tokenizer, self.scale)
        self._written = [tokenizer.decode([i]) for i in self.scale.score_ids]
        ready_made = JudgeTexts("", "", "", "", [{"role": "user", "content": "a"}])  # no template may need more of it
        self._thought = thought_left_open(self._builder.chat(ready_made))

    def request(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of ``client.completions.create`` beside the model's name.

        The prompt goes as token ids, so it is the very one of training, and nothing in a response can pass for the end
        of its turn.

        Args:
            row: Fields as of :meth:`real_fast.Judge.grade_batch`.

        Raises:
            RowError: The row cannot be graded; the message says why.
        """
        rollout = self.config.rollout
        return {
            "prompt": self._builder.ids(
                parse_texts(row, self._builder.uses("rubric"), self.scale.phrase, self._builder.uses("extra"))
            ),
            "max_tokens": rollout.max_tokens,
            "temperature": self.config.eval.temperature,
            "top_p": rollout.top_p,
            "logprobs": _TOP,
            "extra_body": {"logprob_token_ids": list(self.scale.score_ids)},
        }

    def grade(self, completion: Any) -> Grade:
        """The grade out of an answer with log-probabilities.

        Args:
            completion: Of ``client.completions.create`` or ``client.chat.completions.create``, as the client's object
                or as the JSON that it came as. Of several choices, score distributions are averaged.

        Raises:
            GradeError: The answer holds no log-probabilities, ones that cannot be, or is not one of the two.
        """
        answer = completion.model_dump() if hasattr(completion, "model_dump") else completion
        try:
            tokens = [_tokens(choice["logprobs"]) for choice in answer["choices"]]
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            if isinstance(error, GradeError):
                raise
            raise GradeError(
                "the completion has no log-probabilities: send what request() gives, or logprobs=True and "
                f"top_logprobs={_TOP} with a chat ({type(error).__name__}: {error})"
            ) from error
        if not tokens:
            raise GradeError("the completion has no choices")
        rollouts = [self._rollout(one) for one in tokens]
        for rollout in rollouts:
            known = [x for x in rollout.score_logprobs or () if x is not None]
            if known and (wrong := no_distribution(known)):
                raise GradeError(f"the completion's log-probabilities are none: {wrong}")
        return verdict(rollouts, self.scale, "real", self.config.objective.renormalize)

    def _rollout(self, tokens: list[tuple[str, dict[str, float]]]) -> Rollout:
        """The verdict as both engines have it, which stop there: the first phrase with a score behind it."""
        text = "".join(token for token, _ in tokens)
        phrase, scale = self.scale.phrase.strip(), self.scale
        space = scale.phrase[len(scale.phrase.rstrip()) :]
        found = [
            (place.at, written_behind(text, place.at + len(phrase), space, scale.texts).score)
            for place in phrases_outside(text, phrase, self._thought)[0]
        ]
        at, score = next((one for one in found if one[1] is not None), found[0] if found else (len(text), None))
        start = 0
        for token, likely in tokens:
            if start >= at + len(phrase) and token.strip():  # the first token behind the phrase and its white space
                logprobs = [likely.get(one, -math.inf) for one in self._written]
                written = None if score is None else scale.values[score]
                return Rollout([], [], [], 0, "phrase", logprobs, written, text[:at])
            start += len(token)
        return Rollout([], [], [], 0, "length", None, None, text)


def _tokens(logprobs: Any) -> list[tuple[str, dict[str, float]]]:
    """Each sampled token, and the log-probabilities of the likeliest ones there, its own among them."""
    if logprobs.get("content") is not None:  # a chat's
        return [
            (_text(one["token"]), {_text(t["token"]): _logprob(t["logprob"]) for t in (*one["top_logprobs"], one)})
            for one in logprobs["content"]
        ]
    each = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    return [
        (_text(token), {other: _logprob(value) for other, value in {**(top or {}), token: own}.items()})
        for token, own, top in each
    ]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a token is text, and not {type(value).__name__}")
    return value


def _logprob(value: Any) -> float:
    """A log-probability; one that is missing or NaN stays NaN, and so makes no score."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"a log-probability is a number, and not {type(value).__name__}")
    if value > ROUNDING:
        raise GradeError(f"the completion's log-probabilities are none: {value:.4g} is above 0")
    return float(value)
