"""What hostile data goes through. Each target takes bytes; an error that is not for people, or a wrong result, raises.

The soak gives them malformed data and measures them, a fuzzer looks for what breaks them, and the tests replay what it
has found.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from real_fast import Judge
from real_fast.config import PromptConfig
from real_fast.data.dataset import Rejected, write_rejected
from real_fast.data.readers import Unreadable, jsonl_records, read
from real_fast.data.rows import cut_score, parse_row, parse_texts
from real_fast.data.sources import Source
from real_fast.data.values import plain
from real_fast.errors import DataError, GradeError, UserError
from real_fast.judging.lines import RAW, grade_lines
from real_fast.judging.served import ServedJudge
from real_fast.prompt.builder import PromptBuilder
from real_fast.score.phrase import PhraseFinder, parse_sample
from real_fast.score.scale import ScoreScale
from real_fast.score.verdict import phrases_outside
from real_fast.types import AnswerMode, JudgeTexts
from tests.judging.fakes import FakeEngine, rollout
from tests.soak import resumed

PHRASE = "So the overall score is "
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.bz2", ".json.xz")
MAPPED = {"instruction": "x.a", "scores": "extra_info.scores", "messages": "chat"}
MOST_TOKENS = 2048  # of a prompt, and of a sampled text
_MODES: tuple[AnswerMode, ...] = ("forced", "cut", "generated", "none")


class Targets:
    """The targets, by name in :attr:`by_name`.

    Args:
        tokenizers: By name; the first is the judge's.
        model: Folder of the judge's model, of which nothing but the name is used.
    """

    def __init__(self, tokenizers: dict[str, Any], model: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hostile-"))
        first = next(iter(tokenizers.values()))
        (self.folder / "extra.jinja").write_text("{{ response }}{% if 'x' in extra %}{{ extra.x }}{% endif %}")
        (self.folder / "plain.txt").write_text("{instruction}|{response}|{rubric}|{reference_answer}")
        templates = ("short", "prometheus", str(self.folder / "plain.txt"))
        self.scale = ScoreScale.from_tokenizer(first, [1, 2, 3, 4, 5], PHRASE)
        self.builders = [
            PromptBuilder(PromptConfig(template=template), tokenizer, self.scale)
            for tokenizer in tokenizers.values()
            for template in templates
        ]
        self.finder = PhraseFinder(first, self.scale)
        engine = FakeEngine([rollout([0.1, 0.1, 0.1, 0.6, 0.05], text=f"Good. {PHRASE}")])
        with mock.patch("real_fast.judging.judge.load_engine", lambda *_: engine):
            self.judge = Judge(model, tokenizer=first, prompt={"template": "short"}, scale=[1, 2, 3, 4, 5])
        self.served = ServedJudge(model, tokenizer=first, prompt={"template": "short"}, scale=[1, 2, 3, 4, 5])
        self.by_name: dict[str, Callable[[bytes], None]] = {
            "readers": self.readers,
            "rows": self.rows,
            "prompts": self.prompts,
            "verdicts": self.verdicts,
            "answers": self.answers,
            "lines": self.lines,
            "config": lambda data: resumed.config(self.folder, data),
            "resume": lambda data: resumed.resume(self.folder, data),
        }

    def close(self) -> None:
        """Remove what they wrote."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def readers(self, data: bytes) -> None:
        """A file, its first byte saying which kind: records with their places, or an error that names the file."""
        self.file(ENDINGS[data[0] % len(ENDINGS)] if data else ".jsonl", data[1:])

    def file(self, ending: str, data: bytes) -> None:
        """The same, its kind given."""
        path = self.folder / f"data{ending}"
        path.write_bytes(data)
        last = 0
        try:
            for place, record in read(Source(str(path))):
                assert place > last, "places are in order"
                last = place
                self._row(record, place)
        except DataError as error:
            assert path.name in str(error), f"the file is not named: {error}"
            str(error).encode()

    def rows(self, data: bytes) -> None:
        """A JSON line as a record."""
        for place, record in jsonl_records([data]):
            self._row(record, place)

    def _row(self, record: Any, place: int) -> None:
        """A row whose label lies on the scale and whose texts are texts, or a reason that can be written down."""
        if isinstance(record, Unreadable):
            self._refused(place, record.reason, record.text)
            return
        for fields, extra in (({}, True), (MAPPED, False)):
            try:
                row = parse_row(record, f"row:{place}", self.scale, False, fields, extra)
            except UserError as error:
                self._refused(place, str(error), record)
                continue
            assert math.isfinite(row.label) and 1 <= row.label <= 5, f"label {row.label}"
            assert all(1 <= label <= 5 for label in row.feedback_labels)
            texts = [row.id, row.instruction, row.response, row.rubric, row.reference_answer, *row.feedbacks]
            "".join([*texts, *(m["content"] for m in row.messages)]).encode()

    def _refused(self, place: int, reason: str, row: Any) -> None:
        assert reason, "no reason"
        write_rejected(self.folder / "rejected.jsonl", [Rejected("f", place, "i", reason, row)])
        (line,) = (self.folder / "rejected.jsonl").read_bytes().splitlines()
        json.loads(line, parse_constant=_no_constant)

    def prompts(self, data: bytes, builders: Sequence[PromptBuilder] = ()) -> None:
        """A JSON line as texts to grade: its tokens hold the control tokens of a plain row, and no others."""
        record = _object(data)
        try:
            texts = parse_texts(record, False, PHRASE, True)
        except UserError:
            return
        bare = JudgeTexts("a", "b", texts.rubric and "c", texts.reference_answer and "d")
        bare.messages = [{"role": m["role"], "content": m["content"] and "e"} for m in texts.messages]
        for builder in builders or self.builders:
            with suppress(UserError):
                prompt, control = builder.marked(texts), set(builder.guard.control.values())
                builder.check_length(prompt, MOST_TOKENS)
                both = builder.encode([prompt, builder.marked(bare)])
                found, usual = ([i for i in some if i in control] for some in both)
                assert found == usual, f"control tokens {found}, which are {usual} with other texts"

    def verdicts(self, data: bytes) -> None:
        """A text as a sampled answer: what counts as sampled was sampled, and a score is one of the scale."""
        text = data.decode(errors="replace")[: 64 * MOST_TOKENS]
        assert len(cut_score(text, self.scale)) <= len(text)
        for thought in ("", "</think>"):
            places, _ = phrases_outside(text, PHRASE.strip(), thought)
            found = [place.at for place in places]
            assert found == sorted(set(found)) and all(text.startswith(PHRASE.strip(), at) for at in found)
        ids = self.finder.spelling.tokenizer.encode(text[: 8 * MOST_TOKENS], add_special_tokens=False)[:MOST_TOKENS]
        for mode in _MODES:
            parsed = parse_sample(ids, frozenset({2}), self.finder, mode)
            kept = len(parsed.context_ids) - parsed.n_forced
            assert 0 <= parsed.num_actions <= len(ids) and list(ids[:kept]) == parsed.context_ids[:kept]
            assert parsed.written_score in (None, *self.scale.values)
            assert mode != "generated" or not parsed.has_score or parsed.written_score is not None

    def answers(self, data: bytes) -> None:
        """A server's answer: a grade whose score lies on the scale, a grade without one, or a refusal."""
        try:
            grade = self.served.grade(_object(data))
        except GradeError:
            return
        _check_grade(vars(grade))

    def lines(self, data: bytes) -> None:
        """Lines to grade: each that is not blank comes back once, in order, whole, with a grade or an error."""
        records = list(jsonl_records(data.splitlines(keepends=True)))
        graded = [line for line, _ in grade_lines(self.judge, records, "grade", 0)]
        assert len(graded) == len(records), f"{len(graded)} lines for {len(records)}"
        for (_, record), line in zip(records, graded, strict=True):
            assert line.endswith(b"\n") and line.count(b"\n") == 1
            found = json.loads(line, parse_constant=_no_constant)
            if not isinstance(record, dict):
                text = record.text.rstrip("\r\n") if isinstance(record, Unreadable) else record
                assert RAW in found and (not isinstance(text, str) or found[RAW] == text)
            elif RAW not in found:
                assert {k: v for k, v in found.items() if k in record} == plain(record), "the row's own fields changed"
            name = max((n for n in found if n.startswith("grade")), key=lambda n: list(found).index(n))
            _check_grade(found[name])
            for unexpected in ("the row cannot be read", "sampling failed"):
                assert not str(found[name].get("error")).startswith(unexpected), found[name]["error"]


def _check_grade(grade: dict[str, Any]) -> None:
    score, error = grade.get("score"), grade.get("error")
    assert (score is None) == bool(error), f"score {score}, error {error}"
    assert score is None or (math.isfinite(score) and 0 <= score <= 5.0001), f"score {score}"
    mass = grade.get("off_scale_mass")
    assert mass is None or -1e-3 <= mass <= 1, f"off_scale_mass {mass}"


def _object(data: bytes) -> Any:
    """The JSON value of a line, None for none."""
    records = [record for _, record in jsonl_records([data])]
    return records[0] if records and not isinstance(records[0], Unreadable) else None


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")
