"""What vLLM answered to requests, before texts are made of it: each request's own samples, all of them, and whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from real_fast.errors import EngineError


def completions(
    outputs: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    n: int,
    most: Sequence[int],
    places: Sequence[int],
    vocabulary: int,
) -> list[list[Any]]:
    """Each request's samples, in their order.

    Args:
        outputs: vLLM's, with ``outputs`` and, of vLLM in this process, ``prompt_token_ids``.
        prompts: What was sent.
        n: Samples of each that were asked for.
        most: Tokens of a sample that were asked for, at most, by request.
        places: Of the prompts that the requests are about, for messages.
        vocabulary: Rows of the model's embedding.

    Raises:
        EngineError: Another number of requests, another request's answer, or samples that are not whole.
    """
    if len(outputs) != len(prompts):
        raise EngineError(f"vLLM answered {len(outputs)} requests, and got {len(prompts)}")
    found: list[list[Any]] = []
    for output, prompt, limit, place in zip(outputs, prompts, most, places, strict=True):
        samples = sorted(output.outputs, key=lambda one: one.index)
        wrong = ""
        given = getattr(output, "prompt_token_ids", None)
        if given is not None and list(given) != list(prompt):
            wrong = "the answer to another prompt"
        elif [one.index for one in samples] != list(range(n)):
            wrong = f"samples {[one.index for one in samples]}, where 0 to {n - 1} were asked for"
        else:
            wrong = next(filter(None, (_problem(one, limit, vocabulary) for one in samples)), "")
        if wrong:
            raise EngineError(f"vLLM gave no sample: {wrong}", place)
        found.append(samples)
    return found


def _problem(completion: Any, most: int, vocabulary: int) -> str:
    """What is wrong with a sample, or ""."""
    ids, flat = completion.token_ids, completion.logprobs
    if not len(ids):
        return "an empty text"
    if len(ids) > most:
        return f"{len(ids)} tokens, where at most {most} were asked for"
    if not 0 <= min(ids) <= max(ids) < vocabulary:
        return f"token ids from {min(ids)} to {max(ids)}, and the model has 0 to {vocabulary - 1}"
    if flat is None or not len(ids) == len(flat.start_indices) == len(flat.end_indices):
        return f"{len(ids)} tokens with the log-probabilities of {0 if flat is None else len(flat.start_indices)}"
    return ""
