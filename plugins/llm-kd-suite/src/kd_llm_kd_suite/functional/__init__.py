"""Losses of language-model distillation as pure functions: tensors in; a scalar, or a value per position, out.

The teacher's side never receives a gradient, and float16 or bfloat16 inputs are computed in float32. What is given in
a wrong shape or range raises `ValueError` and says what would fit.
"""

from kd_llm_kd_suite.functional.divergences import (
    DIVERGENCES,
    divergence,
    forward_kl,
    generalized_jsd,
    js_distance,
    mean,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    symmetric_kl,
    total_variation,
)
from kd_llm_kd_suite.functional.features import attention_kl, attention_mse, hidden_ce, hidden_l1, hidden_l2, mmd
from kd_llm_kd_suite.functional.policy import (
    advantages,
    clipped_policy_loss,
    masked_mean,
    penalised_reward,
    reinforce,
    returns,
    reward_model_loss,
    rewards,
    single_step_regulariser,
    token_logprobs,
    whiten,
)
from kd_llm_kd_suite.functional.preferences import best_nll, dpo, pro, rrhf, sequence_logprobs
from kd_llm_kd_suite.functional.tokenizers import align, span_logprobs, span_uld, token_ends, uld

__all__ = [
    "DIVERGENCES",
    "advantages",
    "align",
    "attention_kl",
    "attention_mse",
    "best_nll",
    "clipped_policy_loss",
    "divergence",
    "dpo",
    "forward_kl",
    "generalized_jsd",
    "hidden_ce",
    "hidden_l1",
    "hidden_l2",
    "js_distance",
    "masked_mean",
    "mean",
    "mmd",
    "penalised_reward",
    "pro",
    "reinforce",
    "returns",
    "reverse_kl",
    "reward_model_loss",
    "rewards",
    "rrhf",
    "sequence_logprobs",
    "single_step_regulariser",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "span_logprobs",
    "span_uld",
    "symmetric_kl",
    "token_ends",
    "token_logprobs",
    "total_variation",
    "uld",
    "whiten",
]
