"""What goes into a packed sequence, and which of its rows go to the head."""

from __future__ import annotations

from random import Random

import torch
from hypothesis import given
from hypothesis import strategies as st

from real_fast.batching.pack import pack_batch, pack_batches, pad_batch
from real_fast.model.policy import Policy
from real_fast.types import Group, Rollout
from tests.batching.plain_pack import plain_pack, plain_pad
from tests.helpers import EOS, make_groups


def policy_of(tiny_llama, shared=True, **config):
    return Policy(tiny_llama(**config).double(), attention="sdpa" if shared else None)


def test_every_prompt_token_is_attended_and_no_forced_token_is_a_target():
    (group,) = make_groups(2, n=1)
    batch = pad_batch([group], pad_id=EOS)
    for i, rollout in enumerate(group.rollouts):
        length = len(group.prompt_ids) + len(rollout.context_ids)
        assert batch.attention_mask[i].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
        mine = batch.rollout == i
        assert batch.targets[mine].tolist() == rollout.sampled_ids
        first = i * batch.input_ids.shape[1] + len(group.prompt_ids) - 1
        assert batch.rows[mine].tolist() == list(range(first, first + len(rollout.sampled_ids)))
        assert int(batch.score_rows[i]) == i * batch.input_ids.shape[1] + length - 1


def test_a_packed_row_spelled_out():
    (group,) = make_groups(2, n=1)
    other = make_groups(3, n=1)[0]
    empty = Rollout([EOS], [-1.0], [], 0, "eos", None, None)  # a generated answer that ended at once
    other.rollouts = [other.rollouts[0], empty, other.rollouts[2]]
    other.index = 1
    batch = pack_batch([group, other])
    ids, positions, rollouts = [], [], []
    for g in (group, other):
        p = len(g.prompt_ids)
        prompt_end = len(ids) + p - 1
        ids += g.prompt_ids
        positions += range(p)
        for r in g.rollouts:
            rollouts.append((r, prompt_end, len(ids)))
            ids += r.context_ids
            positions += range(p, p + len(r.context_ids))
    assert batch.input_ids.tolist() == [ids] and batch.position_ids.tolist() == [positions]
    for i, (r, prompt_end, start) in enumerate(rollouts):
        mine = batch.rollout == i
        n = len(r.sampled_ids)
        assert batch.targets[mine].tolist() == r.sampled_ids
        assert batch.rows[mine].tolist() == [prompt_end, *range(start, start + n)][:n]
        assert int(batch.score_rows[i]) == (start + len(r.context_ids) - 1 if r.context_ids else prompt_end)
    assert batch.rollout_valid.tolist() == [r.has_score for r, *_ in rollouts]


def rollouts_of(lengths, draw):
    """Rollouts of (context, forced, sampled EOS, end behind the score, score)."""
    made = []
    for context, forced, eos, ends, score in lengths:
        ids = [draw.randrange(3, 300) for _ in range(context)]
        sampled = ids[: max(0, context - forced)] + [EOS] * eos
        scores = [-draw.random() for _ in range(3)] if score else None
        end, outcome = (7, EOS) if ends else None, draw.randrange(4) if score else None
        logprobs = [-draw.random() for _ in sampled]
        made.append(Rollout(sampled, logprobs, ids, forced, "eos", scores, None, ending=end, outcome=outcome))
    return made


rollout_shapes = st.tuples(st.integers(0, 6), st.integers(0, 2), st.booleans(), st.booleans(), st.booleans())


@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 9), st.booleans(), st.lists(rollout_shapes, min_size=1, max_size=4)),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 2**32),
)
def test_packing_equals_packing_token_by_token_to_the_last_bit(shapes, seed):
    draw = Random(seed)
    groups = []
    for prompt, raters, lengths in shapes:
        labels = [draw.uniform(1, 3) for _ in lengths] if raters else None
        ids = [draw.randrange(3, 300) for _ in range(prompt)]
        groups.append(Group(draw.randrange(100), ids, draw.uniform(1, 3), rollouts_of(lengths, draw), labels))
    cut = draw.randrange(1, len(groups)) if len(groups) > 1 else 0
    parts = [groups[:cut], groups[cut:]] if cut else [groups]
    pairs = [(pack_batch(groups), plain_pack(groups)), (pad_batch(groups, EOS), plain_pad(groups, EOS))]
    pairs += zip(pack_batches(parts), map(plain_pack, parts), strict=True)
    for got, want in pairs:
        for name, value in vars(want).items():
            mine = getattr(got, name)
            if name == "layout" and value is not None:
                mine, value = mine.segments, value.segments
            if isinstance(value, torch.Tensor):
                assert mine.dtype == value.dtype and mine.shape == value.shape and torch.equal(mine, value), name
            else:
                assert mine == value, name
