"""``--debug``: a run made small, so that every part of it has been seen within a minute or two."""

from __future__ import annotations

from dataclasses import replace

from real_fast.config.schema import Config
from real_fast.distributed.launch import launched

EVAL_ROWS = 8  # a run evaluates on the first of them: a limit in data takes whole prompts, which may be large


def smaller(config: Config) -> Config:
    """The settings with sizes cut to a few steps, rows and tokens, and engine and trainer compared at every step."""
    c, least = config, max(2, launched())  # a row for every rank
    return replace(
        c,
        log_level="debug",
        rollout=replace(
            c.rollout,
            prompts_per_step=min(c.rollout.prompts_per_step, least),
            group_size=min(c.rollout.group_size, 4),
            max_tokens=min(c.rollout.max_tokens, 48),
            check_every=1,
            log_every=1,
        ),
        supervised=replace(c.supervised, prompts_per_step=min(c.supervised.prompts_per_step, least)),
        warmup=replace(c.warmup, steps=min(c.warmup.steps, 2), batch_size=min(c.warmup.batch_size, 4)),
        train=replace(c.train, steps=min(c.train.steps, 3)),
        eval=replace(c.eval, bootstrap=min(c.eval.bootstrap, 50)),
    )
