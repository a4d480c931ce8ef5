"""One self-contained HTML page per run: numbers, figures, settings, and the answers that it got most wrong."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment
from markupsafe import Markup

from real_fast.utils.files import replacing

_FIGURES = (
    ("training.png", "Training"),
    ("health.png", "Training health"),
    ("before_after.png", "Predicted against true score"),
    ("histogram.png", "Expected scores and labels"),
    ("calibration.png", "Calibration"),
)
_COLUMNS = ("n", "pearson", "spearman", "kendall", "rmse", "mae", "bias", "off_scale_mass", "truncated", "no_score")
_DRIFT = "engine and trainer drift apart: set rollout.engine to transformers, or train.precision to fp32, and compare"
_POINT = "the score distribution has collapsed to a point: lower optim.lr or objective.beta, or train for fewer steps"
# What is worth a look, and when: (key, meaning, test on the mean of the last steps, advice).
_WARNINGS = (
    ("score/off_scale_mass", lambda x: x > 0.2, "much of the probability is off the scale: warm up longer"),
    ("frac_reward_zero_std", lambda x: x > 0.5, "most groups have no spread: raise group_size or the temperature"),
    ("completions/clipped_ratio", lambda x: x > 0.5, "most feedback is cut off: raise rollout.max_tokens"),
    ("score/forced", lambda x: x > 0.9, "the model hardly writes the phrase itself: warm up on feedback"),
    ("sampling/sampling_logp_difference/mean", lambda x: x > 0.05, _DRIFT),
    # About the entropy of sampled text itself: what is written now would hardly have come from the reference.
    ("kl", lambda x: x > 0.5, "the feedback is far from the reference's: set objective.kl_coef or lower optim.lr"),
    ("score/entropy", lambda x: x < 0.05, _POINT),
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } img { max-width: 100% }
td, th { border-bottom: 1px solid #ddd; padding: .3em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } pre { background: #f6f6f6; padding: 1em; overflow-x: auto }
.warning { background: #fff3e0; padding: .5em 1em } .text { text-align: left; max-width: 60em; white-space: pre-wrap }
"""
# What data can bring into the page is text; should any of it ever be more, the browser runs and fetches nothing.
_POLICY = (
    "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'"
)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<title>{{ title }}</title><style>{{ style }}</style></head><body>
<h1>{{ title }}</h1>
<p>{{ about }}</p>
{% for warning in warnings %}<p class="warning">{{ warning }}</p>{% endfor %}
<h2>Evaluation</h2>
<table><tr><th>held-out rows</th>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr>
{% for name, cells in evaluations %}<tr><td>{{ name }}</td>{% for c in cells %}<td>{{ c }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p>RAIL predictions; in brackets 95 % intervals by resampling prompts{{ average }}.</p>
{% for name, data in figures %}<h2>{{ name }}</h2><img alt="{{ name }}" src="data:image/png;base64,{{ data }}">
{% endfor %}
<h2>Largest errors</h2>
<table><tr><th>row</th><th>label</th><th>ŷ</th><th class="text">feedback</th></tr>
{% for r in worst %}<tr><td>{{ r.id }}</td><td>{{ "%.2f"|format(r.label) }}</td>
<td>{{ "%.2f"|format(r.prediction) }}</td><td class="text">{{ r.feedback }}</td></tr>
{% endfor %}</table>
{% if rollouts %}<h2>Newest rollouts (update {{ rollouts[0].step }})</h2>
<table><tr><th>row</th><th>label</th><th>ŷ</th><th>reward</th><th>advantage</th><th class="text">distribution</th>
<th class="text">text</th></tr>
{% for r in rollouts %}<tr><td>{{ r.id }}</td><td>{{ number(r.label) }}</td><td>{{ number(r.expected_score) }}</td>
<td>{{ number(r.reward) }}</td><td>{{ number(r.advantage) }}</td>
<td class="text">{% for k, p in (r.distribution or {}).items() %}{{ k }}: {{ number(p) }}
{% endfor %}</td><td class="text">{{ r.text }}</td></tr>
{% endfor %}</table>{% endif %}
<h2>Numbers</h2><pre>{{ summary }}</pre>
<h2>Settings</h2><pre>{{ settings }}</pre>
</body></html>
"""


def write(
    folder: Path,
    summary: dict[str, Any],
    metrics: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    rollouts: list[dict[str, Any]],
) -> None:
    """Write ``report.html`` into a run's folder, whose figures and config.yaml are there already.

    Args:
        folder: The run's.
        summary: As in summary.json.
        metrics: Lines of the training phase.
        rows: Predictions of the last evaluation.
        rollouts: Lines of rollouts.jsonl; those of the newest update are shown.
    """
    evaluations = [
        (title, [_cell(one, c) for c in _COLUMNS])
        for name, e in summary["eval"].items()
        if e
        for title, one in [(name, e), *((f"{name}: {b}", each) for b, each in e.get("benchmarks", {}).items())]
    ]
    figures = [
        (name, base64.b64encode((folder / file).read_bytes()).decode())
        for file, name in _FIGURES
        if (folder / file).is_file()
    ]
    scored = [r for r in rows if r["prediction"] is not None]
    worst = sorted(scored, key=lambda r: -abs(r["prediction"] - r["label"]))[:10]
    settings = folder / "config.yaml"
    page = Environment(autoescape=True).from_string(_PAGE)
    text = page.render(
        policy=Markup(_POLICY),
        style=Markup(_STYLE),
        title=f"{summary['method']}: {summary['model']}",
        about=f"{summary['steps']} steps on {summary['train_rows']} rows, seed {summary['seed']}; "
        f"{summary['rejected_rows']} rows rejected, {summary['skipped_steps']} steps skipped",
        warnings=health_warnings(metrics),
        columns=_COLUMNS,
        evaluations=evaluations,
        average="; of several benchmarks, first their plain average" if len(evaluations) > len(summary["eval"]) else "",
        figures=figures,
        worst=[{**r, "feedback": _first(r["feedback"])} for r in worst],
        rollouts=[r for r in rollouts if r["step"] == rollouts[-1]["step"]],
        number=lambda x: "-" if x is None else f"{x:.2f}",
        summary=yaml.safe_dump({k: v for k, v in summary.items() if k != "eval"}, sort_keys=False),
        settings=settings.read_text(encoding="utf-8") if settings.is_file() else "",
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def health_warnings(metrics: list[dict[str, Any]]) -> list[str]:
    """What the last steps of a run show that its user should know."""
    found = []
    last = metrics[-5:]
    for key, bad, advice in _WARNINGS:
        values = [m[key] for m in last if m.get(key) is not None]
        if values and bad(sum(values) / len(values)):
            if len(values) == 1 and last[-1].get(key) is not None:
                where = "on the last step"
            elif len(values) == len(last):
                where = f"over the last {len(last)} steps"
            else:
                where = f"in {len(values)} of the last {len(last)} steps"
            found.append(f"{key} is {sum(values) / len(values):.3g} {where}: {advice}.")
    return found


def _cell(evaluation: dict[str, Any], column: str) -> str:
    value = evaluation.get(column)
    if value is None:
        return "-"
    text = f"{value}" if isinstance(value, int) else f"{value:.3f}"
    interval = (evaluation.get("ci95") or {}).get(column)
    return f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else text


def _first(feedback: str | list[str]) -> str:
    return feedback if isinstance(feedback, str) else feedback[0]
