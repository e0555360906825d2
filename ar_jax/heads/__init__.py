"""Heads: what is p(token | hidden). A new head is one file and a line in this table."""

from ar_jax.heads.categorical import Categorical
from ar_jax.heads.diffusion import Diffusion
from ar_jax.heads.mixture import GaussianMixture
from ar_jax.heads.variational import Variational

HEADS = {
    "categorical": Categorical,
    "gaussian_mixture": GaussianMixture,
    "diffusion": Diffusion,
    "variational": Variational,
}
