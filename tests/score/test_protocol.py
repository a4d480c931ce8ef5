"""Protocols: what a prediction is read from, and where the feedback is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from real_fast.config import EvalConfig, RolloutConfig
from real_fast.evaluation.metrics import table
from real_fast.evaluation.run import evaluate
from real_fast.score.phrase import PhraseFinder, parse_sample
from real_fast.score.protocol import Prediction, ProtocolName, answer_mode, read
from real_fast.score.scale import ScoreScale
from real_fast.types import JudgeRow, Rollout, SamplingParams

PHRASE = "So the overall score is "
EOS = frozenset({2})
SCALE = ScoreScale((1.0, 2.0, 4.5), ("1", "2", "4.5"), (11, 12, 13), "Score: ", (5, 6), 1)


def rollout(p: Sequence[float] | None, written: float | None = None) -> Rollout:
    logprobs = None if p is None else [math.log(x) if x > 0 else -math.inf for x in p]
    return Rollout([7], [-1.0], [7], 0, "phrase", logprobs, written, "f")


# Prediction


def test_the_same_rollouts_by_three_protocols() -> None:
    rollouts = [rollout([0.1, 0.2, 0.4], 4.5), rollout([0.5, 0.5, 0.0], 1.0), rollout(None)]
    rail = read(rollouts, SCALE, "real", False)
    assert rail.prediction == pytest.approx(((0.1 + 0.4 + 1.8) + (0.5 + 1.0)) / 2)
    assert rail.distribution == pytest.approx({"1": 0.3, "2": 0.35, "4.5": 0.2})
    assert (rail.off_scale_mass, rail.decoded) == (pytest.approx(0.15), pytest.approx(2.75))
    assert read(rollouts, SCALE, "tract", False) == rail
    decode = read(rollouts, SCALE, "decode", False)
    assert decode.prediction == decode.decoded == pytest.approx(2.75)
    assert decode.distribution == {"1": 0.5, "2": 0.0, "4.5": 0.5}
    assert decode.off_scale_mass == pytest.approx(0.15)  # what the model said, whatever it was read by
    assert read(rollouts, SCALE, "decode", True).prediction == pytest.approx(2.75)


def test_nothing_written_is_no_decoded_prediction() -> None:
    assert read([rollout([0.1, 0.9, 0.0])], SCALE, "decode", False).prediction is None
    assert read([rollout(None, 2.0)], SCALE, "decode", False) == Prediction(2.0, {"1": 0, "2": 1, "4.5": 0}, None, 2.0)
    assert read([rollout(None, 2.0)], SCALE, "real", False) == Prediction(None, None, None, 2.0)


def test_only_real_leaves_the_answer_open() -> None:
    modes: dict[ProtocolName, tuple[str, str]] = {}
    for protocol in ("real", "tract", "raft", "decode"):
        modes[protocol] = (answer_mode(protocol, "forced"), answer_mode(protocol, "generated"))
    assert modes == {
        "real": ("forced", "generated"),
        "tract": ("cut", "cut"),
        "raft": ("none", "none"),
        "decode": ("generated", "generated"),
    }


class FixedEngine:
    name, vocabulary = "fixed", 100

    def __init__(self, answers: list[list[Rollout]]) -> None:
        self.answers = answers
        self.answer: str = ""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        self.answer = sampling.answer
        return [self.answers[p[0]] for p in prompts]

    def sync(self, named_tensors: Any) -> None: ...

    def close(self) -> None: ...


def test_every_protocol_has_the_same_summary() -> None:
    labels = [1.0, 2.0, 4.5, 2.0]
    rows = [JudgeRow(f"r{i}", f"p{i}", "i", "r", "", "", y, [], [], [i, 9]) for i, y in enumerate(labels)]
    # The written scores run against the labels and the probabilities with them: which was read shows in the sign.
    p = [[0.8, 0.1, 0.0], [0.4, 0.5, 0.0], [0.0, 0.1, 0.9], [0.2, 0.5, 0.2]]
    written = [4.5, 2.0, 1.0, 1.0]
    engine = FixedEngine([[rollout(a, b)] for a, b in zip(p, written, strict=True)])
    protocols: tuple[ProtocolName, ...] = ("real", "tract", "decode")
    found = {
        protocol: evaluate(engine, rows, SCALE, EvalConfig(bootstrap=20, protocol=protocol), RolloutConfig(), 0).summary
        for protocol in protocols
    }
    assert [summary["protocol"] for summary in found.values()] == list(protocols)
    assert found["real"].keys() == found["tract"].keys() == found["decode"].keys()
    assert found["real"]["pearson"] > 0.9 and found["tract"]["pearson"] == found["real"]["pearson"]
    decode = found["decode"]
    assert decode["pearson"] == decode["decoded"]["pearson"] == found["real"]["decoded"]["pearson"] < -0.5
    # Calibration is that of the prediction, not of the probabilities.
    assert decode["calibration_error"] == pytest.approx((sum(labels) - sum(written)) / 4) == 0.25
    assert decode["label_probability"] == pytest.approx(0.25)
    assert "RAIL" in table(found["tract"]) and "RAIL" not in table(decode)


# Cutting


def cut(ids: list[int], finder: PhraseFinder) -> tuple[list[int], int | None, float | None, str]:
    parsed = parse_sample(ids, EOS, finder, "cut")
    phrase = list(finder.scale.phrase_ids)
    assert parsed.has_score and parsed.n_forced == len(phrase)
    assert parsed.context_ids == [*ids[: parsed.num_actions], *phrase]
    return parsed.context_ids, parsed.score_position, parsed.written_score, parsed.finish


def test_cut_and_forced_coincide_on_the_phrase_in_its_own_tokens(smollm2_tokenizer: Any, finder: PhraseFinder) -> None:
    ids = smollm2_tokenizer.encode(f"Fine. {PHRASE}4 and more")
    forced = parse_sample(ids, EOS, finder, "forced")
    found = cut(ids, finder)
    assert found == (forced.context_ids, forced.score_position, 4.0, "phrase") and forced.score_position is not None


@pytest.mark.parametrize(("ending", "finish"), [([2], "eos"), ([], "length")])
def test_cut_and_forced_coincide_where_no_phrase_was_written(
    smollm2_tokenizer: Any, finder: PhraseFinder, ending: list[int], finish: str
) -> None:
    ids = smollm2_tokenizer.encode("It is fine.") + ending
    assert cut(ids, finder) == (parse_sample(ids, EOS, finder, "forced").context_ids, None, None, finish)


@pytest.mark.parametrize(
    ("between", "phrase"),
    [("\n\n", PHRASE + "4"), (" ", PHRASE.rstrip() + ":4"), (" ", PHRASE.rstrip() + "\n4 of 5"), ("\n", ""), (" ", "")],
)
def test_the_score_is_a_function_of_the_feedback_alone(
    smollm2_tokenizer: Any, scale: ScoreScale, finder: PhraseFinder, between: str, phrase: str
) -> None:
    """Whatever stands around the phrase; the forced answer keeps what the model put in front of it."""
    feedback = smollm2_tokenizer.encode("It names four fruits.")
    ids = smollm2_tokenizer.encode(f"It names four fruits.{between}{phrase}")
    assert ids[: len(feedback)] == feedback
    assert cut([*ids, 2], finder)[0] == [*feedback, *scale.phrase_ids]


def test_another_spelling_of_the_phrase_gives_way_to_its_own_tokens(
    smollm2_tokenizer: Any, scale: ScoreScale, finder: PhraseFinder
) -> None:
    canonical = smollm2_tokenizer.encode(f"Fine. {PHRASE}4")
    at = canonical.index(smollm2_tokenizer.encode(" overall")[0])
    other = [i for piece in (" over", "all") for i in smollm2_tokenizer.encode(piece)]
    ids = [*canonical[:at], *other, *canonical[at + 1 :]]
    assert parse_sample(ids, EOS, finder, "forced").context_ids == ids[:-1]
    context, position, written, _ = cut(ids, finder)
    assert context == canonical[:-1] and position is None and written == 4.0


def test_words_that_only_begin_like_the_phrase_are_feedback(smollm2_tokenizer: Any) -> None:
    scale = ScoreScale.from_tokenizer(smollm2_tokenizer, [1, 2, 3], "And the score: ")
    shorter = ScoreScale(scale.values, scale.texts, scale.score_ids, "And the score ", scale.phrase_ids, 3)
    ids = smollm2_tokenizer.encode("Fine. And the scores differ. And the score 3")
    finder = PhraseFinder(smollm2_tokenizer, shorter)
    assert smollm2_tokenizer.decode(ids[: finder.before(ids)]) == "Fine. And the scores differ."
    assert finder.before([]) == 0 == finder.before(smollm2_tokenizer.encode("And the score 3"))


def test_a_token_that_runs_into_the_phrase_goes_with_it() -> None:
    class Words:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(("It is", " good", ".Score", ":", " 2")[i] for i in ids)

    finder = PhraseFinder(Words(), SCALE)
    assert finder.before([0, 1, 2, 3, 4]) == 2 and finder.end([0, 1, 2, 3, 4]) == 4
