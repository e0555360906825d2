"""Optimisers and learning-rate schedules by kind."""

from ar_jax.training.optimizers import adafactor, adamw, lion, muon, sgd
from ar_jax.training.schedules import constant, cosine, infinite, warmup_stable_decay

OPTIMIZERS = {"adafactor": adafactor, "adamw": adamw, "lion": lion, "muon": muon, "sgd": sgd}
SCHEDULES = {"constant": constant, "cosine": cosine, "infinite": infinite, "warmup_stable_decay": warmup_stable_decay}
