"""Several judges on one model, threads, forks."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from real_fast import Judge
from real_fast.errors import JudgeError
from real_fast.judging.sharing import Alone
from real_fast.types import Rollout, SamplingParams
from tests.judging.fakes import ROW, FakeEngine, rollout


def test_two_judges_on_one_model_grade_as_one_does(tiny_llama: Callable[..., Any], small_tokenizer: Any) -> None:
    """Sampling swaps the model's weights and modes in place; side by side, one would compute with the other's."""
    model = tiny_llama(vocab_size=len(small_tokenizer), hidden_size=16)
    judges = [
        Judge(model, tokenizer=small_tokenizer, rollout={"max_tokens": 4}, prompt={"template": "short"})
        for _ in range(2)
    ]
    forward, inside, most = model.forward, 0, 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.002)
        try:
            return forward(*args, **kwargs)
        finally:
            inside -= 1

    want = judges[0].grade(**ROW)
    model.forward = watched
    found: list[Any] = []
    threads = [threading.Thread(target=lambda j=j: found.append(j.grade(**ROW))) for j in judges * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and found == [want] * 4
    assert not torch.is_inference_mode_enabled() and all(p.device.type == "cpu" for p in model.parameters())


def test_judges_on_one_tokenizer_take_turns() -> None:
    tokenizer, a, b = object(), object(), object()
    first, second, other = Alone(a, tokenizer), Alone(tokenizer, b), Alone(object())
    entered = threading.Event()

    def enter() -> None:
        with second.held():
            entered.set()

    with first.held(), other.held():
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(5)
    thread.join()


def test_a_judge_is_made_while_no_other_uses_its_tokenizer(
    tiny_llama: Callable[..., Any], small_tokenizer: Any
) -> None:
    model, made = tiny_llama(vocab_size=len(small_tokenizer), hidden_size=16), threading.Event()

    def make() -> None:
        Judge(model, tokenizer=small_tokenizer, prompt={"template": "short"})
        made.set()

    with Alone(small_tokenizer).held():
        thread = threading.Thread(target=make)
        thread.start()
        assert not made.wait(0.3)
    assert made.wait(10)
    thread.join()


def in_a_fork(check: Callable[[], bool]) -> bool:
    """What `check` says in a forked process; False where it does not come back within seconds."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(5)
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_after_a_fork_a_judge_says_so_and_does_not_hang(with_engine: Callable[..., Judge]) -> None:
    """The fork happens while a thread of the parent holds the locks, which nobody will let go in the child."""
    working, go_on = threading.Event(), threading.Event()

    class Slow(FakeEngine):
        def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
            working.set()
            go_on.wait(20)
            return super().generate(prompts, sampling)

    judge = with_engine(Slow([rollout([0.5, 0.25, 0.25])]))
    thread = threading.Thread(target=judge.grade, kwargs=ROW)
    thread.start()
    working.wait(5)

    def refused(call: Callable[[], object]) -> bool:
        try:
            call()
        except JudgeError as error:
            return "was forked from it" in str(error) and "spawn" in str(error)
        return False

    def check() -> bool:
        calls = (
            lambda: judge.grade(**ROW),
            lambda: judge.grade_batch([ROW]),
            lambda: judge.single_absolute_grade("a", "b", "c"),
            lambda: asyncio.run(judge.agrade(**ROW)),
            lambda: asyncio.run(judge.agrade_batch([ROW])),
        )
        said = all([refused(call) for call in calls])
        judge.close()  # as leaving a `with` would
        return said

    try:
        assert in_a_fork(check)
    finally:
        go_on.set()
        thread.join()
    assert judge.grade(**ROW).score == pytest.approx(1.75)  # the parent's goes on


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_judge_made_after_a_fork_waits_for_nobody(
    with_engine: Callable[..., Judge], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither for the lock of what it shares, which a thread of the parent holds, nor for OpenMP's threads."""
    engine = FakeEngine([rollout([0.5, 0.25, 0.25])])
    tokenizer = with_engine(engine)._builder.tokenizer
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with Alone(tokenizer).held():
            held.set()
            go_on.wait(20)

    def check() -> bool:
        grade = with_engine(engine, tokenizer=tokenizer).grade(**ROW)
        return grade.score is not None and torch.get_num_threads() == 1 and "on one thread" in caplog.text

    thread, threads = threading.Thread(target=hold), torch.get_num_threads()
    thread.start()
    held.wait(5)
    torch.set_num_threads(2)
    try:
        assert in_a_fork(check) and torch.get_num_threads() == 2 and not caplog.text
    finally:
        torch.set_num_threads(threads)
        go_on.set()
        thread.join()
