"""Awaited requests: graded together, each with its own grade and its own error."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from real_fast import Grade, GradeError, Judge
from real_fast.errors import JudgeError
from real_fast.types import Rollout, SamplingParams
from tests.judging.fakes import ROW, FakeEngine, rollout

Make = Callable[..., Judge]
ROWS = [{**ROW, "response": f"{fruit} {i}."} for i in range(8) for fruit in ("An apple", "A pear", "A car", "Rain")]


class Held(FakeEngine):
    """Waits for `gate` in its first call, so that requests gather behind it."""

    def __init__(self, rollouts: list[Rollout]) -> None:
        super().__init__(rollouts)
        self.gate, self.entered = threading.Event(), threading.Event()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        self.entered.set()
        assert self.gate.wait(10)
        return super().generate(prompts, sampling)


@pytest.fixture
def held() -> Held:
    return Held([rollout([0.5, 0.25, 0.25])])


async def behind(held: Held, judge: Judge, *calls: Any) -> list[Any]:
    """Results or exceptions of calls that were all made while the engine was busy with another one."""
    first = asyncio.create_task(judge.agrade(**ROW))
    await asyncio.to_thread(held.entered.wait, 10)
    tasks = [asyncio.ensure_future(call) for call in calls]
    await asyncio.sleep(0.01)
    held.gate.set()
    await first
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_calls_that_wait_are_few_batches(held: Held, with_engine: Make) -> None:
    judge = with_engine(held, rollout={"max_num_seqs": 24})
    grades = asyncio.run(behind(held, judge, *(judge.agrade(**row) for row in ROWS)))
    assert [len(prompts) for prompts, _ in held.calls] == [1, 24, 8]  # no more at a time than the engine samples
    assert [g.score for g in grades] == pytest.approx([1.75] * 32)
    assert [p for prompts, _ in held.calls[1:] for p in prompts] == [judge._prompt(row) for row in ROWS]


def test_a_grade_does_not_depend_on_who_waits_beside_it(tiny_llama: Callable[..., Any], small_tokenizer: Any) -> None:
    model = tiny_llama(vocab_size=len(small_tokenizer), hidden_size=16)
    settings: dict[str, Any] = {"prompt": {"template": "short"}, "rollout": {"max_tokens": 4}, "renormalize": True}
    with Judge(model, tokenizer=small_tokenizer, n=2, **settings) as judge:
        batches = []
        engine = judge._engine
        assert engine is not None
        generate = engine.generate

        def counted(prompts: Any, sampling: Any) -> Any:
            batches.append(len(prompts))
            return generate(prompts, sampling)

        engine.generate = counted  # type: ignore[method-assign]

        async def together(seed: int) -> list[Grade]:
            return await asyncio.gather(*(judge.agrade(**row, seed=seed) for row in ROWS[:6]))

        found = asyncio.run(together(3))
        assert len(batches) <= 2 and sum(batches) == 6
        for row, grade in zip(ROWS, found, strict=False):
            alone = judge.grade(**row, seed=3)
            assert alone.feedback == grade.feedback and alone.score == pytest.approx(grade.score, abs=1e-5)
        assert asyncio.run(together(4))[0].feedback != found[0].feedback
    with Judge(model, tokenizer=small_tokenizer, temperature=0, **settings) as judge:
        found, batch = asyncio.run(together(0)), judge.grade_batch(ROWS[:6])
        assert [g.feedback for g in found] == [g.feedback for g in batch]
        assert [g.score for g in found] == pytest.approx([g.score for g in batch], abs=1e-5)


def test_an_error_goes_to_its_own_caller(held: Held, with_engine: Make) -> None:
    judge = with_engine(held)
    bad: Any = {**ROW, "response": float("nan")}
    good, wrong, other = asyncio.run(
        behind(held, judge, judge.agrade(**ROW), judge.agrade(**bad), judge.agrade(**ROW, seed=1))
    )
    assert isinstance(wrong, GradeError) and "response" in str(wrong)
    assert good.score == other.score == pytest.approx(1.75)
    assert len({sampling.seed for _, sampling in held.calls[1:]}) == 2  # another seed is another call


def test_a_call_that_is_cancelled_while_it_waits_costs_nothing(held: Held, with_engine: Make) -> None:
    judge = with_engine(held)

    async def impatient() -> Any:
        return await asyncio.wait_for(judge.agrade(**{**ROW, "response": "Never mind."}), 0.002)

    late, fine = asyncio.run(behind(held, judge, impatient(), judge.agrade(**ROW)))
    assert isinstance(late, TimeoutError) and fine.score == pytest.approx(1.75)
    assert [len(prompts) for prompts, _ in held.calls] == [1, 1]


def test_a_loop_that_ended_takes_nothing_down(held: Held, with_engine: Make) -> None:
    judge = with_engine(held)
    loop = asyncio.new_event_loop()
    task = loop.create_task(judge.agrade(**ROW))
    loop.run_until_complete(asyncio.sleep(0))
    assert held.entered.wait(10)
    loop.call_soon(loop.stop)
    loop.run_forever()
    task.cancel()
    loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()
    held.gate.set()
    assert asyncio.run(judge.agrade(**ROW)).score == pytest.approx(1.75)


def test_what_stops_a_whole_batch_reaches_everybody(held: Held, with_engine: Make) -> None:
    judge = with_engine(held)
    judge.close()
    with pytest.raises(JudgeError, match="closed"):
        asyncio.run(judge.agrade(**ROW))
    held.gate.set()
    broken = with_engine(held)
    broken._verdict = None  # type: ignore[assignment, method-assign]

    async def both() -> list[Any]:
        return await asyncio.gather(*(broken.agrade(**ROW) for _ in range(2)), return_exceptions=True)

    assert [type(error) for error in asyncio.run(both())] == [TypeError, TypeError]
