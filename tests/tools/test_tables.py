"""Generated tables: the committed pages hold exactly what the committed results make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tools import run_tables, tables

ROOT = tables.ROOT
# Each marker and the pages that have it: a table that no page shows is a mistake.
WHERE = {
    "quickstart": "README.md",
    "bench-step": "README.md docs/packing.md",
    "bench-sweep": "docs/packing.md",
    "host-time": "docs/packing.md",
    "host-cards": "docs/packing.md",
    "bench-plots": "docs/packing.md",
    "bench-rollout": "docs/rollouts.md",
    "bench-vllm": "docs/rollouts.md",
    "optimizers": "docs/less-memory.md",
    "head-gradient": "docs/less-memory.md",
    "body-measured": "docs/faster-layers.md",
    "body-arithmetic": "docs/faster-layers.md",
    "bench-head": "docs/kernels.md",
    "bench-head-savings": "docs/kernels.md",
    "bench-head-plots": "docs/kernels.md",
    "gpu-predictions": "docs/kernels.md",
    "kernels": "docs/kernels.md",
    "measured": "docs/measured.md",
    "lora": "docs/lora.md",
    "experiment": "docs/methods.md",
    "plan-check": "docs/planning.md",
    "one-gpu": "docs/one-gpu.md",
    "scaling-plan": "docs/scaling.md",
    "scaling-efficiency": "docs/scaling.md",
    "scaling-measured": "docs/scaling.md",
    "scaling-same": "docs/scaling.md",
    "ahead-seeds": "docs/methods.md",
    "paper-rows": "experiments/paper.md",
    "paper-commands": "experiments/paper.md",
    "reliability": "docs/reliability.md",
    "reliability-faults": "docs/reliability.md",
    "reliability-figures": "docs/reliability.md",
} | dict.fromkeys(
    (
        "experiment-reduced",
        "experiment-rows",
        "experiment-primary",
        "experiment-primary-rows",
        "experiment-other-texts",
        "experiment-primary-other-texts",
        "experiment-without-a-model",
        "experiment-comparison",
        "experiment-seeds",
        "experiment-label-only",
        "experiment-halves",
        "experiment-elsewhere",
        "experiment-honesty",
        "experiment-averaged",
        "experiment-cost",
        "experiment-raters",
        "experiment-runs",
        "experiment-search",
        "experiment-timing",
        "experiment-noise",
        "experiment-remedies",
        "experiment-bigger",
    ),
    "docs/experiment.md",
)


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return tables.tables(ROOT)


@pytest.mark.parametrize("page", tables.pages(ROOT), ids=lambda page: page.name)
def test_the_committed_pages_have_the_committed_results(page: Path, made: dict[str, str]) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text, page, made, ROOT) == text, "run: make tables"


def test_every_table_has_its_page(made: dict[str, str]) -> None:
    found: dict[str, list[str]] = {}
    for page in tables.pages(ROOT):
        for name in tables.markers(page.read_text(encoding="utf-8"), page.name):
            found.setdefault(name, []).append(page.relative_to(ROOT).as_posix())
    assert {name: " ".join(pages) for name, pages in found.items()} == WHERE and made.keys() == WHERE.keys()


def test_fill_replaces_what_stands_between_the_markers_alone() -> None:
    text = "a\n<!-- x:start -->\nold\n<!-- x:end -->\nb\n"
    assert tables.fill(text, "x", "new") == "a\n<!-- x:start -->\nnew\n<!-- x:end -->\nb\n"
    assert tables.fill(text, "y", "new") == text


def test_images_are_linked_from_where_the_page_lies(tmp_path: Path) -> None:
    text = "<!-- x:start -->\n<!-- x:end -->\n"
    made = {"x": "![a](/docs/a.png)"}
    for page, link in (("README.md", "docs/a.png"), ("docs/page.md", "../docs/a.png")):
        assert f"![a]({link})" in tables.filled(text, tmp_path / page, made, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- x:start -->\n", "page.md: every .* needs its"),
        ("<!-- x:end -->\n<!-- x:start -->\n", "needs its"),
        ("<!-- y:start -->\n<!-- y:end -->\n", "page.md: no table is called y; there are x"),
    ],
)
def test_markers_that_cannot_be_filled(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(tables.MarkerError, match=message):
        tables.filled(text, tmp_path / "page.md", {"x": ""}, tmp_path)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a copy of the results with an old README: keep a run, write the pages, find nothing left to write."""
    for folder in ("docs/results", "benchmarks/results", "experiments"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- measured:start -->\nold\n<!-- measured:end -->\n", encoding="utf-8")
    run = tmp_path / "run"
    run.mkdir()
    shutil.copyfile(ROOT / "docs" / "results" / "vicuna.json", run / "summary.json")
    (run / "training.png").write_bytes(b"png")
    (run / "metrics.jsonl").write_text('{"phase": "warmup"}\n{"phase": "real", "reward": -2.5}\n', encoding="utf-8")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["keep", str(run), "mine"]) == 0
    assert "README.md: written" in capsys.readouterr().out and "| mine | vllm |" in readme.read_text("utf-8")
    assert (tmp_path / "docs" / "results" / "mine-training.png").read_bytes() == b"png"
    assert json.loads((tmp_path / "docs" / "results" / "mine.json").read_text("utf-8"))["rewards"] == [-2.5]
    assert tables.main([]) == 0 and "up to date" in capsys.readouterr().out
    assert tables.main(["keep", str(tmp_path / "gone"), "mine"]) == 2 and "gone" in capsys.readouterr().err
    assert tables.main(["keep"]) == 2
    assert tables.main(["show"]) == 0 and "| reference-style |" in capsys.readouterr().out


def test_rewards_by_thirds() -> None:
    made = run_tables.thirds({"lora-x": {"rewards": [-4.0, -2.0, -2.0, -1.0, -0.5, -1.5, 0.0]}})
    assert "| lora-x | -3.00 ± 1.00 | -1.17 ± 0.44 | -0.75 ± 0.75 | +2.25 ± 1.25 | -4.00, -2.00," in made


def test_a_run_without_a_score_has_dashes() -> None:
    assert run_tables.pearson(None) == "-" == run_tables.rmse(None)
    assert run_tables.pearson({"pearson": None}) == "-"
