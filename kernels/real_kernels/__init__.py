"""real_kernels: the fused head of REAL, for any trainer.

Log-probabilities of a few tokens per row out of hidden states and the lm_head's weight, and the REAL loss on top of
them, without logits of size [N, V] in memory. Needs torch alone; Triton, where it is, for the fast kernels.
"""

from real_kernels.advantage import group_advantages
from real_kernels.logprob import linear_logprob, logprob_and_entropy, score_logprobs, weighted_logprob
from real_kernels.loss import RealLossOutput, real_loss
from real_kernels.options import HeadOptions, RealObjective
from real_kernels.reward import RewardParts, RewardTerms, expected_score, label_weights, reward_parts, reward_terms

__all__ = [
    "HeadOptions",
    "RealLossOutput",
    "RealObjective",
    "RewardParts",
    "RewardTerms",
    "expected_score",
    "group_advantages",
    "label_weights",
    "linear_logprob",
    "logprob_and_entropy",
    "real_loss",
    "reward_parts",
    "reward_terms",
    "score_logprobs",
    "weighted_logprob",
]
