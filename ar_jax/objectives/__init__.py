"""Objectives: what is trained. A new objective is one file and a line in this table."""

from ar_jax.objectives.gate_distillation import GateDistillation
from ar_jax.objectives.learned_order import LearnedOrder
from ar_jax.objectives.masked import Masked
from ar_jax.objectives.next_patch import NextPatch
from ar_jax.objectives.next_token import NextToken, Permuted
from ar_jax.objectives.random_groups import RandomGroups

OBJECTIVES = {
    "next_token": NextToken,
    "permuted": Permuted,
    "masked": Masked,
    "gate_distillation": GateDistillation,
    "random_groups": RandomGroups,
    "next_patch": NextPatch,
    "learned_order": LearnedOrder,
}
