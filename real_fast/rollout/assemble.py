"""What both engines do alike: ids that end a text, seeds, prompt checks, and putting a rollout together."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from real_fast.score.phrase import Parsed, PhraseFinder
from real_fast.score.scale import ScoreScale
from real_fast.types import Rollout, SamplingParams


def eos_ids(tokenizer: Any, scale: ScoreScale, generation_config: Any | None) -> frozenset[int]:
    """Ids that end a generation: the tokenizer's, the one that ends an answer, and the generation config's.

    The last is an int, a list of ints, or None.
    """
    found = [tokenizer.eos_token_id, scale.end_id, getattr(generation_config, "eos_token_id", None)]
    return frozenset(
        int(i) for ids in found if ids is not None for i in (ids if isinstance(ids, list | tuple) else [ids])
    )


def check_prompts(
    prompts: Sequence[Sequence[int]], sampling: SamplingParams, scale: ScoreScale, limit: int | None, vocabulary: int
) -> None:
    """Refuse prompts that cannot be sampled from, before any work is done.

    Args:
        prompts: Token ids.
        sampling: How they will be sampled from.
        scale: The score scale; its phrase may be appended to a sampled text.
        limit: Most tokens that a sequence may have; None for no limit.
        vocabulary: Rows of the model's embedding.

    Raises:
        ValueError: Fewer than one rollout or token asked for; an empty prompt, one with a token that the model does not
            have, or one with no room behind it for the sampled text, the phrase and the score. The message names the
            prompt by its place.
    """
    if sampling.n < 1 or sampling.max_tokens < 1:
        raise ValueError(f"n is {sampling.n} and max_tokens {sampling.max_tokens}: both must be at least 1")
    behind = sampling.max_tokens + scale.most_appended + 1
    for place, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {place} has no tokens")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise ValueError(
                f"prompt {place} has the token id {wrong}, and the model has the ids 0 to {vocabulary - 1}: its "
                "tokenizer is another model's, or tokens were added to it alone"
            )
        if limit is not None and len(prompt) + behind > limit:
            raise ValueError(
                f"prompt {place} has {len(prompt)} tokens, and a sequence may have {limit}: with {sampling.max_tokens} "
                f"sampled tokens, {scale.most_appended} of the phrase and the score, {limit - behind} are left for a "
                "prompt. Lower prompt.max_tokens or rollout.max_tokens"
            )


def build_rollout(
    finder: PhraseFinder,
    ids: Sequence[int],
    logprobs: Sequence[float],
    parsed: Parsed,
    score_logprobs: list[float] | None,
    texts: bool = True,
) -> Rollout:
    """Put a rollout together from the sampled `ids`, a log-probability of each, and what :func:`parse_sample` says.

    `texts`: see :class:`SamplingParams`.
    """
    if len(ids) != len(logprobs):
        raise RuntimeError(f"the engine returned {len(ids)} sampled ids and {len(logprobs)} log-probabilities")
    context = array("q", parsed.context_ids)
    kept = len(context) - parsed.n_forced  # what was sampled of it
    return Rollout(
        sampled_ids=context[: min(kept, parsed.num_actions)] + array("q", ids[kept : parsed.num_actions]),
        sampled_logprobs=array("d", logprobs[: parsed.num_actions]),
        context_ids=context,
        n_forced=parsed.n_forced,
        finish=parsed.finish,
        score_logprobs=score_logprobs,
        unread=parsed.has_score and score_logprobs is None,
        written_score=parsed.written_score,
        text=finder.decode(parsed.context_ids) if texts else "",
    )
