from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch

from real_fast.config import EvalConfig, RolloutConfig
from real_fast.data.synthetic import generate
from real_fast.errors import OutputError
from real_fast.evaluate import main, parse, run
from real_fast.evaluation.benchmarks import tables
from real_fast.evaluation.metrics import CORRELATIONS
from real_fast.evaluation.run import evaluate
from real_fast.rollout.engine import RolloutEngine
from real_fast.score.scale import ScoreScale
from real_fast.types import Finish, JudgeRow, Rollout, SamplingParams
from real_fast.utils.jsonio import write_jsonl

SCALE = ScoreScale((1.0, 2.0, 4.5), ("1", "2", "4.5"), (11, 12, 13), "Score: ", (5, 6), 1)
KEYS = {*CORRELATIONS, "n", "n_scored", "no_score", "rmse", "mae", "bias", "ci95", "constant_resamples", "reasons"}


def rollout(
    p: Sequence[float] | None, written: float | None = None, tokens: int = 3, finish: Finish = "phrase", text: str = "f"
) -> Rollout:
    logprobs = None if p is None else [math.log(x) if x > 0 else -math.inf for x in p]
    return Rollout([7] * tokens, [-1.0] * tokens, [7] * tokens, 0, finish, logprobs, written, text)


class ScriptedEngine:
    """Hands out prepared rollouts by the prompt's first token, and remembers how it was called."""

    name = "scripted"
    dtype = torch.float32

    def __init__(self, answers: list[list[Rollout]]) -> None:
        self.answers = answers
        self.calls: list[tuple[list[list[int]], SamplingParams]] = []

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        self.calls.append(([list(p) for p in prompts], sampling))
        return [self.answers[p[0]] for p in prompts]

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None: ...

    def close(self) -> None: ...


def rows(labels: Sequence[float]) -> list[JudgeRow]:
    return [
        JudgeRow(f"r{i}", f"p{i // 2}", "instruction", "response", "rubric", "", label, [], [], prompt_ids=[i, 99])
        for i, label in enumerate(labels)
    ]


CONFIG = EvalConfig(n=1, temperature=0.7, bootstrap=20)


def test_expected_score_over_the_full_softmax() -> None:
    engine: RolloutEngine = ScriptedEngine([[rollout([0.1, 0.2, 0.4], written=4.5)]])
    result = evaluate(engine, rows([2.0]), SCALE, CONFIG, RolloutConfig(), seed=0)
    (row,) = result.predictions
    assert row["prediction"] == pytest.approx(0.1 * 1 + 0.2 * 2 + 0.4 * 4.5)  # not divided by 0.7
    assert row["distribution"] == pytest.approx({"1": 0.1, "2": 0.2, "4.5": 0.4})
    assert row["off_scale_mass"] == pytest.approx(0.3) == result.summary["off_scale_mass"]
    assert {k: row[k] for k in ("id", "prompt_id", "label", "decoded", "feedback", "n")} == {
        "id": "r0", "prompt_id": "p0", "label": 2.0, "decoded": 4.5, "feedback": "f", "n": 1,
    }  # fmt: skip
    assert result.summary["label_probability"] == pytest.approx(0.2)


def test_renormalize_divides_by_the_mass_on_the_scale_and_still_reports_the_rest() -> None:
    engine = ScriptedEngine([[rollout([0.1, 0.1, 0.0]), rollout([0.0, 0.6, 0.2])], [rollout([0.0, 0.0, 0.0])] * 2])
    result = evaluate(
        engine, rows([2.0, 1.0]), SCALE, EvalConfig(n=2, bootstrap=5), RolloutConfig(), 0, renormalize=True
    )
    first, second = result.predictions
    assert first["prediction"] == pytest.approx((1.5 + (0.75 * 2 + 0.25 * 4.5)) / 2)
    assert sum(first["distribution"].values()) == pytest.approx(1.0)
    assert first["off_scale_mass"] == pytest.approx((0.8 + 0.2) / 2)
    assert second["prediction"] is None  # nothing to divide by


def test_feedbacks_are_averaged_over_those_with_a_score() -> None:
    answers = [rollout([1, 0, 0], 1.0, text="a"), rollout(None, text="b"), rollout([0, 0.5, 0.5], 4.5, text="c")]
    result = evaluate(ScriptedEngine([answers]), rows([2.0]), SCALE, EvalConfig(n=3, bootstrap=5), RolloutConfig(), 0)
    (row,) = result.predictions
    assert row["prediction"] == pytest.approx((1 + (0.5 * 2 + 0.5 * 4.5)) / 2)
    assert row["decoded"] == pytest.approx((1 + 4.5) / 2)
    assert row["feedback"] == ["a", "b", "c"] and row["n"] == 3


def test_a_missing_score_is_null_and_never_a_number() -> None:
    answers = [
        [rollout([0.8, 0.1, 0.1], 1.0)],
        [rollout(None)],
        [rollout([0.2, 0.7, 0.1], 2.0)],
        [rollout([0.1, 0.2, 0.7])],
        [rollout([math.nan, 0.2, 0.7])],
        [rollout([0.3, 0.5, 0.2], 4.5)],
    ]
    answers[4][0].score_logprobs = [math.nan, -1.0, -1.0]
    labels = [1.0, 4.5, 2.0, 4.0, 4.5, 2.0]
    result = evaluate(ScriptedEngine(answers), rows(labels), SCALE, CONFIG, RolloutConfig(answer="generated"), 0)
    summary = result.summary
    assert [p["prediction"] is None for p in result.predictions] == [False, True, False, False, True, False]
    assert [p["decoded"] for p in result.predictions] == [1.0, None, 2.0, None, None, 4.5]
    assert result.predictions[1]["distribution"] is result.predictions[1]["off_scale_mass"] is None
    assert (summary["n"], summary["no_score"], summary["not_finite"]) == (6, 2, 1)
    assert (summary["decoded"]["n"], summary["decoded"]["no_score"]) == (6, 3)
    # The error is that of the rows with a score; a 0 for the others would make it much larger.
    assert summary["decoded"]["rmse"] == pytest.approx(2.5 / math.sqrt(3))
    y_hat = [1.45, 2.05, 3.65, 2.2]
    want = math.sqrt(sum((p - y) ** 2 for p, y in zip(y_hat, [1.0, 2.0, 4.0, 2.0], strict=True)) / 4)
    assert summary["rmse"] == pytest.approx(want)
    json.dumps([summary, result.predictions], allow_nan=False)


def test_summary_has_both_readings_and_constants_have_reasons() -> None:
    # The model always writes 2, while its distribution tells good from bad: decoding shows nothing, RAIL all.
    answers = [[rollout([0.1, 0.9 - x, x], 2.0, tokens=4 + i, finish="length" if i == 0 else "phrase")]
               for i, x in enumerate([0.0, 0.1, 0.2, 0.4])]  # fmt: skip
    result = evaluate(ScriptedEngine(answers), rows([1.0, 2.0, 3.0, 4.5]), SCALE, CONFIG, RolloutConfig(), seed=3)
    summary = result.summary
    assert summary.keys() >= KEYS and summary["decoded"].keys() == KEYS
    assert summary["spearman"] == pytest.approx(1.0)
    assert summary["decoded"]["pearson"] is None
    assert summary["decoded"]["reasons"]["pearson"] == "all predictions are equal"
    assert summary["decoded"]["rmse"] is not None
    assert summary["mean_length"] == pytest.approx((4 + 5 + 6 + 7) / 4)
    assert summary["truncated"] == 0.25
    assert summary["seconds"] > 0
    assert summary["tokens_per_second"] == pytest.approx(22 / summary["seconds"])


def test_the_engine_gets_the_settings_in_slices_that_draw_different_samples() -> None:
    count = 70
    engine = ScriptedEngine([[rollout([0.2, 0.3, 0.4])] * 4 for _ in range(count)])
    settings = RolloutConfig(max_tokens=17, top_p=0.9, answer="generated", temperature=1.0, group_size=8)
    done: list[int] = []
    evaluate(engine, rows([2.0] * count), SCALE, EvalConfig(4, 4, 0.7, 5), settings, 5, progress=done.append)
    assert [len(prompts) for prompts, _ in engine.calls] == [16, 16, 16, 16, 6] == done
    assert [p for prompts, _ in engine.calls for p in prompts] == [[i, 99] for i in range(count)]
    for _, s in engine.calls:
        assert (s.n, s.max_tokens, s.temperature, s.top_p, s.answer) == (4, 17, 0.7, 0.9, "generated")
    seeds = [s.seed for _, s in engine.calls]
    assert len(set(seeds)) == 5 and all(0 <= seed < 2**31 for seed in seeds)

    def seeds_of(seed: int) -> list[int]:
        engine.calls.clear()
        evaluate(engine, rows([2.0] * count), SCALE, EvalConfig(4, 4, 0.7, 5), settings, seed)
        return [s.seed for _, s in engine.calls]

    assert seeds_of(5) == seeds
    assert set(seeds_of(6)).isdisjoint(seeds)


def test_rows_must_be_there_and_have_prompts() -> None:
    with pytest.raises(ValueError, match="no rows"):
        evaluate(ScriptedEngine([]), [], SCALE, CONFIG, RolloutConfig(), 0)
    bare = rows([1.0])
    bare[0].prompt_ids = []
    with pytest.raises(ValueError, match="'r0' has no prompt_ids"):
        evaluate(ScriptedEngine([]), bare, SCALE, CONFIG, RolloutConfig(), 0)


def trained_folder(folder: Path, **settings: object) -> Path:
    folder.mkdir()
    (folder / "real_fast.json").write_text(json.dumps(settings))
    return folder


def test_a_trained_folder_gives_defaults_and_flags_win(tmp_path: Path) -> None:
    model = trained_folder(
        tmp_path / "final",
        scale={"values": [0, 1], "phrase": "Grade: "},
        prompt={
            "template": "short",
            "system": "s",
            "chat_template_kwargs": {"enable_thinking": False},
            "max_tokens": 99,
        },
        rollout={"answer": "generated", "max_tokens": 33, "max_num_seqs": 1},
        objective={"renormalize": True},
        eval={"protocol": "tract"},
    )
    config = parse(["--model", str(model), "--rollout.max_tokens", "44", "--overwrite", "--output", "o"])
    assert (config.scale.values, config.scale.phrase) == ([0.0, 1.0], "Grade: ")
    assert config.prompt.chat_template_kwargs == {"enable_thinking": False}
    assert (config.prompt.template, config.prompt.max_tokens) == ("short", 99)
    assert (config.rollout.answer, config.rollout.max_tokens) == ("generated", 44)
    assert config.rollout.max_num_seqs == RolloutConfig().max_num_seqs  # the training machine's business
    assert config.renormalize and config.overwrite and config.protocol == "tract"

    file = tmp_path / "e.yaml"
    file.write_text(f"model: {model}\nscale:\n  phrase: 'Mark: '\n")
    config = parse(["--config", str(file)])
    assert (config.scale.values, config.scale.phrase, config.rollout.max_tokens) == ([0.0, 1.0], "Mark: ", 33)
    assert parse(["--model", str(tmp_path)]).scale.values == [1, 2, 3, 4, 5]


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that the command prints to stderr before it ends with status 2."""
    try:
        status = main(argv)
    except SystemExit as exit:
        status = int(exit.code or 0)
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("real-fast evaluate: error: ") and "Traceback" not in err
    return err.removeprefix("real-fast evaluate: error: ")


def test_missing_settings_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = ["--model", str(tmp_path), "--data", "d", "--output", str(tmp_path / "o")]
    for key in ("model", "data", "output"):
        at = base.index(f"--{key}")
        assert f"{key} is not set" in failure(capsys, *base[:at], *base[at + 2 :])
    assert "n is 0: it must be above 0" in failure(capsys, *base, "--n", "0")
    assert "max_rows is -1" in failure(capsys, *base, "--max_rows", "-1")
    assert not (tmp_path / "o").exists()


def test_unknown_and_ill_typed_settings_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--tempereture" in failure(capsys, "--model", str(tmp_path), "--tempereture", "1")
    assert "--n is 'many'" in failure(capsys, "--n", "many")
    file = tmp_path / "e.yaml"
    file.write_text("modle: x\n")
    assert "modle" in failure(capsys, "--config", str(file))
    file.write_text("model: [\n")
    assert f"{file}:2: this is no YAML" in failure(capsys, "--config", str(file))
    broken = trained_folder(tmp_path / "final", scale=3)
    assert "real_fast.json is not what real-fast train writes" in failure(capsys, "--model", str(broken))


def test_missing_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = str(tmp_path / "nowhere")
    message = failure(capsys, "--model", model, "--data", "d", "--output", str(tmp_path / "o"))
    assert f"model {model} does not exist" in message


def test_missing_data(capsys: pytest.CaptureFixture[str], tmp_path: Path, smollm2: Path) -> None:
    data = str(tmp_path / "nowhere.jsonl")
    assert data in failure(capsys, "--model", str(smollm2), "--data", data, "--output", str(tmp_path / "o"))


def test_an_earlier_evaluation_is_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "model").mkdir()
    argv = ["--model", str(tmp_path / "model"), "--data", "d", "--output", str(tmp_path)]
    assert "already holds a summary.json" in failure(capsys, *argv)
    assert "holds no config.json" in failure(capsys, *argv, "--overwrite")  # past that check, to the next
    assert (tmp_path / "summary.json").read_text() == "{}"


def test_an_evaluation_that_dies_while_it_replaces_another_leaves_no_mixture(
    tiny_judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", generate(2, 1, seed=0))
    (tmp_path / "summary.json").write_text('{"pearson": 0.9}')
    argv = ["--model", str(tiny_judge), "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path)]
    argv += ["--rollout.engine", "transformers", "--rollout.max_tokens", "2", "--bootstrap", "2", "--overwrite"]

    def dies(*_: object) -> None:
        raise OSError("killed")

    monkeypatch.setattr("real_fast.evaluate.plots.before_after", dies)
    with pytest.raises(OutputError, match="killed"):
        run(parse(argv))
    assert (tmp_path / "predictions.jsonl").is_file() and not (tmp_path / "summary.json").exists()


def test_an_output_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = failure(capsys, "--model", str(tmp_path), "--data", "d", "--output", str(tmp_path / "file" / "o"))
    assert "cannot be written" in message and str(tmp_path / "file" / "o") in message


# Several benchmarks


def several(*names: str) -> tuple[ScriptedEngine, list[JudgeRow]]:
    p = [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [0.3, 0.5, 0.2]]
    found = rows([1.0, 2.0, 4.5, 2.0] * len(names))
    for i, row in enumerate(found):
        row.benchmark, row.prompt_ids = names[i // 4], [i % 4, 99]
    found[-1].label = 1.0
    return ScriptedEngine([[rollout(x, 2.0 + i)] for i, x in enumerate(p)]), found


def test_several_benchmarks_are_evaluated_each_as_alone_and_averaged() -> None:
    engine, found = several("mt", "flask")
    result = evaluate(engine, found, SCALE, CONFIG, RolloutConfig(), seed=3)
    assert [p["benchmark"] for p in result.predictions] == ["mt"] * 4 + ["flask"] * 4
    parts = result.summary["benchmarks"]
    for name in ("mt", "flask"):
        own = [row for row in found if row.benchmark == name]
        for row in own:
            row.benchmark = ""
        alone = evaluate(engine, own, SCALE, CONFIG, RolloutConfig(), seed=3)
        timed = ("seconds", "tokens_per_second")
        assert {k: v for k, v in alone.summary.items() if k not in timed} == {
            k: v for k, v in parts[name].items() if k not in timed
        }
    for name in (*CORRELATIONS, "rmse", "mae", "bias", "off_scale_mass", "calibration_error"):
        assert result.summary[name] == pytest.approx((parts["mt"][name] + parts["flask"][name]) / 2), name
    decoded = result.summary["decoded"]
    assert decoded["rmse"] == pytest.approx((parts["mt"]["decoded"]["rmse"] + parts["flask"]["decoded"]["rmse"]) / 2)
    assert (result.summary["n"], result.summary["n_scored"], result.summary["no_score"]) == (8, 8, 0)
    assert result.summary["protocol"] == "real" and result.summary["ci95"] == {}
    json.dumps(result.summary, allow_nan=False)
    printed = tables(result.summary)
    assert printed.startswith("mt\n") and "\n\nflask\n" in printed and "\n\naverage of 2 benchmarks\n" in printed


def test_an_average_of_what_one_benchmark_has_not_is_none_with_the_reason() -> None:
    engine, found = several("mt", "flask")
    for row in found[4:]:
        row.label = 2.0
    summary = evaluate(engine, found, SCALE, CONFIG, RolloutConfig(), seed=3).summary
    assert summary["pearson"] is None and summary["reasons"]["pearson"] == "flask: all labels are equal"
    assert "none: flask: all labels are equal" in tables(summary)


def test_a_single_benchmark_with_a_name_is_reported_under_it() -> None:
    engine, found = several("mt")
    summary = evaluate(engine, found, SCALE, CONFIG, RolloutConfig(), seed=3).summary
    assert list(summary["benchmarks"]) == ["mt"] and summary["pearson"] == summary["benchmarks"]["mt"]["pearson"]
