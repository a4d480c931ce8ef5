"""What goes into a packed sequence, and which of its rows go to the head."""

from __future__ import annotations

from real_fast.batching.pack import pack_batch, pad_batch
from real_fast.model.policy import Policy
from real_fast.types import Rollout
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
