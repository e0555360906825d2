"""Everything between a task and its trained parameters: `fit`, and the optimisers and schedules by kind."""

from ar_jax.training.loop import fit, load
from ar_jax.training.program import own_rows
from ar_jax.training.tables import OPTIMIZERS, SCHEDULES

__all__ = ["OPTIMIZERS", "SCHEDULES", "fit", "load", "own_rows"]
