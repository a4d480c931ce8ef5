"""Rollouts by Transformers: our own sampling loop over the key-value cache. Runs wherever the trainer runs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch.func import functional_call

from real_fast.attention.support import decoding, known_reason, rope_of_the_longest
from real_fast.model.lora import adapter_tensors
from real_fast.rollout.assemble import build_rollout, check_prompts, eos_ids
from real_fast.rollout.draw import draw
from real_fast.rollout.kv_cache import make_room
from real_fast.rollout.prefill import (
    Beginning,
    beginnings,
    by_beginning,
    can_join,
    chosen,
    join,
    joined_masks,
    keeps_all,
    left_padded,
    parts,
)
from real_fast.runs.progress import show
from real_fast.score.phrase import Parsed, PhraseFinder, parse_sample
from real_fast.score.scale import ScoreScale
from real_fast.score.verdict import may_close
from real_fast.types import AnswerMode, Rollout, SamplingParams
from real_fast.utils.seeds import random_stream

# Finished sequences leave the batch (which copies the cache) once no more than this share is still running.
_COMPACT_BELOW = 0.75
# Next-token logits, mask and cache of some rows.
_Pass = tuple[torch.Tensor, torch.Tensor, Any]


@dataclass
class _Sequence:
    """One sequence on its way: `feed` is the token that goes into the model next, `forced` those that follow it.

    `thought` closes the thought that its prompt leaves open, `scores` are the score tokens' log-probabilities where
    each of `ids` was sampled, and `seen` is whether the phrase was written, be it in a thought.
    """

    place: int
    sample: int
    random: Random
    thought: str
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    scores: list[list[float]] = field(default_factory=list)
    seen: bool = False
    feed: int = 0
    forced: deque[int] = field(default_factory=deque)
    parsed: Parsed | None = None
    score_logprobs: list[float] | None = None
    done: bool = False


class TransformersEngine:
    """Samples with a Transformers model, the trainer's own or a copy.

    Each prompt is computed once, beside others of about its length, and its cache repeated for its rollouts; so is the
    cache of a beginning that several prompts share, where that saves more than a pass of its own takes. A phrase that
    has to be appended is fed through the same cache, so a forced score costs a few decoding steps and no second pass
    over the prompt.

    Args:
        model: A causal language model; in evaluation mode and without gradients while it samples, then as before.
        tokenizer: Its tokenizer.
        scale: The score scale.
        max_num_seqs: Sequences decoded at a time.
        dtype: Compute in this dtype, with weights cast for as long as a generation lasts; None for the model's own.
            The head computes in fp32.
        device: Compute here, with weights moved for as long; None for where the model is.
    """

    name = "transformers"
    held_bytes = 0
    beside_training = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        scale: ScoreScale,
        *,
        max_num_seqs: int = 256,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self.device = model.device if device is None else device
        self.tokenizer = tokenizer
        self.scale = scale
        self.max_num_seqs = max_num_seqs
        self.dtype = model.dtype if dtype is None else dtype
        self.takes = model.dtype
        self._weights: dict[str, torch.Tensor] = {}
        # Until a layer's cache turns out to be of another kind. Parts of a batch must have the positions of all of it.
        self._joins = not rope_of_the_longest(model) and keeps_all(model.config.get_text_config())
        # Padding behind a beginning is a gap in the cache: far, to an attention that counts keys and not positions.
        self._shares: bool = self._joins and known_reason(model) is None
        self.finder = PhraseFinder(tokenizer, scale)
        self.eos_ids = eos_ids(tokenizer, scale, getattr(model, "generation_config", None))
        self._limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        # A token spells a byte or more: the newest phrase and what was sampled behind it lie within this many tokens.
        self._window = len(self.finder.phrase.encode()) + len(scale.tail_ids) + 8

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Rollout]]:
        """Sample ``sampling.n`` rollouts for every prompt.

        A sample is a function of the weights and (``sampling.seed``, the prompt's place, its own place); which other
        prompts share its batch only changes the floating-point order.

        Raises:
            ValueError: An empty prompt, or one too long for the model's positions; before any work.
            FloatingPointError: The model's logits are not finite.
        """
        check_prompts(prompts, sampling, self.scale, self._limit, self.vocabulary)
        at_once = min(sampling.n, self.max_num_seqs)
        size = self.max_num_seqs // at_once
        # Those that begin alike come into one batch.
        order = by_beginning(prompts, self._beginnings(prompts))
        results: list[list[Rollout]] = [[] for _ in prompts]
        with self._sampling_mode():
            for low in range(0, len(order), size):
                batch = {place: prompts[place] for place in order[low : low + size]}
                for first in range(0, sampling.n, at_once):
                    samples = range(first, min(first + at_once, sampling.n))
                    for s in self._decode(batch, samples, sampling):
                        assert s.parsed is not None
                        results[s.place].append(
                            build_rollout(self.finder, s.ids, s.logprobs, s.parsed, s.score_logprobs, sampling.texts)
                        )
        return results

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the weights by name; those that are the engine's own tensors already stay as they are.

        Raises:
            ValueError: A name the model does not have, another shape, or weights left out (a tied head may be).
        """
        own: dict[str, torch.Tensor] = self.model.state_dict(keep_vars=True)
        given: set[int] = set()
        with torch.no_grad():
            for name, tensor in named_tensors:
                if name not in own:
                    raise ValueError(f"sync got the weight {name!r}, which the engine's model does not have")
                mine = own[name]
                if mine.shape != tensor.shape:
                    raise ValueError(
                        f"sync got {name!r} as {list(tensor.shape)}; the engine's model has {list(mine.shape)}"
                    )
                given.add(mine.data_ptr())
                if mine.data_ptr() != tensor.data_ptr():
                    mine.copy_(tensor.detach())
        # By storage, not by name: a tied head comes along with the embedding.
        missing = [name for name, mine in self.model.named_parameters() if mine.data_ptr() not in given]
        if missing:
            raise ValueError(f"sync did not get {len(missing)} of the model's weights: {', '.join(missing[:5])}")

    def sleep(self) -> bool:
        """Nothing to do: what it holds beside the trainer's model lives only while it samples."""
        return False

    def sync_adapters(self, model: Any) -> None:
        """Copy the adapters of a model; those of the engine's own model stay as they are.

        Raises:
            ValueError: The engine's model has others.
        """
        if model is self.model:
            return
        own, given = adapter_tensors(self.model), adapter_tensors(model)
        if own.keys() != given.keys():
            raise ValueError("sync got the adapters of another model")
        with torch.no_grad():
            for name, tensor in given.items():
                own[name].copy_(tensor)

    def close(self) -> None:
        """Let go of the model."""
        self.model = None

    @contextmanager
    def _sampling_mode(self) -> Iterator[None]:
        if self.model is None:
            raise RuntimeError("this rollout engine is closed")
        training = [module for module in self.model.modules() if module.training]
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
        # In evaluation mode, activation checkpointing does not switch the cache off.
        self.model.eval()
        try:
            with torch.no_grad(), decoding(self.model):
                # Not by autocast, which would keep cached keys in fp32 and cast them at every step.
                for name, weight in self.model.named_parameters(remove_duplicate=False):
                    # Quantised ones (8 bits or fewer, or packed into integers) mean nothing without their scales.
                    if weight.is_floating_point() and weight.element_size() > 1:
                        self._weights[name] = weight.to(self.device, self.dtype)
                # The head in fp32: bf16 logits come in steps of 1/8, and scores with them.
                prefix = next(name for name, module in self.model.named_modules() if module is head)
                for name, weight in head.named_parameters():
                    self._weights[f"{prefix}.{name}"] = weight.to(self.device, torch.float32)
                if self.device.type != self.model.device.type:
                    self._weights |= {name: buffer.to(self.device) for name, buffer in self.model.named_buffers()}
                yield
        finally:
            hook.remove()
            self._weights = {}
            for module in training:
                module.training = True

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any = None
    ) -> tuple[Any, Any]:
        """Next-token logits behind the last of `ids` ([rows, tokens]), [rows, vocabulary] fp32, and the cache."""
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "past_key_values": cache,
        }
        inputs |= {"use_cache": True, "logits_to_keep": 1}
        out = functional_call(self.model, self._weights, (), inputs, tie_weights=False)
        return out.logits[:, -1].float(), out.past_key_values

    def _prefill(self, prompts: Mapping[int, Sequence[int]]) -> tuple[list[int], torch.Tensor, torch.Tensor, Any]:
        """The places of prompts in the order of what follows: next-token logits, the mask and the cache."""
        places, rows = list(prompts), list(prompts.values())
        if self._joins and (found := self._in_parts(rows)) is not None:
            order, (logits, mask, cache) = found
            return [places[row] for row in order], logits, mask, cache
        return places, *self._pass(rows)

    def _beginnings(self, prompts: Sequence[Sequence[int]]) -> list[Beginning]:
        return beginnings(prompts, self.device.type) if self._shares else []

    def _in_parts(self, rows: Sequence[Sequence[int]]) -> tuple[list[int], _Pass] | None:
        """The rows' numbers in another order, and what comes of them; None if caches cannot be joined, from then on."""
        shared = self._beginnings(rows)
        within = {row: number for number, one in enumerate(shared) for row in one.places}
        alone = [row for row in range(len(rows)) if row not in within]
        order, done = self._passes(alone, rows)
        if shared:
            firsts = [rows[one.places[0]][: one.tokens] for one in shared]
            numbers, starts = self._passes(range(len(firsts)), firsts)
            if not all(can_join(cache) for _, _, cache in starts):
                self._joins = False
                return None
            start = _together(starts)
            begun = {row: numbers.index(number) for row, number in within.items()}
            rest = {row: rows[row][shared[number].tokens :] for row, number in within.items()}
            more, passes = self._passes(list(rest), rest, begun, start)
            order, done = order + more, done + passes
        if len(done) > 1 and not all(can_join(cache) for _, _, cache in done):
            self._joins = False
            return None
        return order, _together(done)

    def _passes(
        self,
        numbers: Sequence[int],
        rows: Sequence[Sequence[int]] | Mapping[int, Sequence[int]],
        begun: Mapping[int, int] | None = None,
        start: _Pass | None = None,
    ) -> tuple[list[int], list[_Pass]]:
        """Passes over the rows of these numbers, longest first: the numbers in this order, and what comes of them.

        With `start`, row r goes on from that pass's row ``begun[r]``.
        """
        order = sorted(numbers, key=lambda row: -len(rows[row]))
        done = []
        for part in parts([len(rows[row]) for row in order]) if order else []:
            some = order[part]
            if start is None or begun is None:
                done.append(self._pass([rows[row] for row in some]))
                continue
            picked = torch.tensor([begun[row] for row in some], device=self.device)
            done.append(self._pass([rows[row] for row in some], start[1][picked], chosen(start[2], picked)))
        return order, done

    def _pass(self, rows: Sequence[Sequence[int]], before: torch.Tensor | None = None, cache: Any = None) -> _Pass:
        """Next-token logits behind rows of ids, the mask and the cache; `before` is the mask of what `cache` has."""
        ids, mask = (x.to(self.device) for x in left_padded(rows))
        if before is not None:
            mask = torch.cat([before, mask], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits, cache = self._forward(ids, mask, positions, cache)
        return logits, mask, cache

    def _decode(self, prompts: dict[int, Sequence[int]], samples: range, sampling: SamplingParams) -> list[_Sequence]:
        device = self.device
        places, logits, mask, cache = self._prefill(prompts)
        longest = mask.shape[1]
        if len(samples) > 1:
            cache.batch_repeat_interleave(len(samples))
            logits = logits.repeat_interleave(len(samples), 0)
            mask = mask.repeat_interleave(len(samples), 0)
        make_room(cache)
        position = mask.sum(-1, keepdim=True)
        thoughts = {place: self.finder.thought(prompt) for place, prompt in prompts.items()}
        sequences = [
            _Sequence(place, s, random_stream(sampling.seed, sampling.place(place), s), thoughts[place])
            for place in places
            for s in samples
        ]
        slots = sequences
        while True:
            self._step(slots, logits, prompts, sampling)
            live = [slot for slot, sequence in enumerate(slots) if not sequence.done]
            if not live:
                return sequences
            if len(live) <= _COMPACT_BELOW * len(slots):
                keep = torch.tensor(live, device=device)
                cache.batch_select_indices(keep)
                mask, position, slots = mask[keep], position[keep], [slots[slot] for slot in live]
            feed = torch.tensor([[sequence.feed] for sequence in slots], device=device)
            mask = torch.cat([mask, mask.new_ones(len(slots), 1)], dim=-1)
            show(f"{len(sequences) - len(live)} of {len(sequences)} texts, token {mask.shape[1] - longest}")
            logits, cache = self._forward(feed, mask, position, cache)
            position = position + 1

    def _step(
        self, slots: list[_Sequence], logits: torch.Tensor, prompts: dict[int, Sequence[int]], sampling: SamplingParams
    ) -> None:
        """Take every sequence one token further, given its next-token logits."""
        score_ids = self.scale.ids_tensor(logits.device)
        scores = (logits[:, score_ids] - logits.logsumexp(-1, keepdim=True)).tolist()
        uniform = [0.0 if sequence.done else sequence.random.random() for sequence in slots]
        tokens, logprobs = draw(logits, uniform, sampling.temperature, sampling.top_p)
        for sequence, token, logprob, score in zip(slots, tokens, logprobs, scores, strict=True):
            if sequence.done:
                continue
            if not math.isfinite(logprob):
                raise FloatingPointError(
                    f"the model's logits are not finite after {len(sequence.ids)} tokens behind prompt {sequence.place}"
                )
            if sequence.parsed is None:
                self._sampled(sequence, token, logprob, score, prompts[sequence.place], sampling)
            elif sequence.forced:
                sequence.feed = sequence.forced.popleft()
            else:
                sequence.score_logprobs, sequence.done = score, True

    def _sampled(
        self,
        s: _Sequence,
        token: int,
        logprob: float,
        score: list[float],
        prompt: Sequence[int],
        sampling: SamplingParams,
    ) -> None:
        """Add a sampled token; when it is the last one, see where the score comes from."""
        s.ids.append(token)
        s.logprobs.append(logprob)
        s.scores.append(score)
        s.feed = token
        if token not in self.eos_ids and len(s.ids) < sampling.max_tokens and not self._answered(s, sampling.answer):
            return
        s.parsed = parsed = parse_sample(s.ids, self.eos_ids, self.finder, sampling.answer, s.thought)
        cached = len(s.ids) - 1  # the model has seen all sampled tokens but this one
        if not parsed.has_score:
            s.done = True
        elif parsed.score_position is not None:
            s.score_logprobs, s.done = s.scores[parsed.score_position], True
        elif len(parsed.context_ids) > cached and parsed.context_ids[:cached] == s.ids[:cached]:
            s.forced = deque(parsed.context_ids[cached:])
            s.feed = s.forced.popleft()
        else:  # the phrase came to light late, so the cache holds tokens that do not belong to the context
            ids = torch.tensor([[*prompt, *parsed.context_ids]], device=self.device)
            logits, _ = self._forward(ids, torch.ones_like(ids), torch.arange(ids.shape[1], device=ids.device)[None])
            s.score_logprobs, s.done = logits.log_softmax(-1)[0, list(self.scale.score_ids)].tolist(), True

    def _answered(self, s: _Sequence, answer: AnswerMode) -> bool:
        """Whether the verdict is written: looked for at a new phrase, and at what may end a thought or a quotation."""
        new = self.finder.phrase in self.finder.decode(s.ids[-self._window :])
        s.seen = s.seen or new
        if not (new or (s.seen and may_close(self.finder.decode(s.ids[-1:])))):
            return False
        return self.finder.settled(s.ids, answer, s.thought)


def _together(done: Sequence[_Pass]) -> _Pass:
    """Of several passes one; their caches are used up."""
    if len(done) == 1:
        return done[0]
    logits, masks, caches = zip(*done, strict=True)
    return torch.cat(logits), joined_masks(masks), join(caches)
