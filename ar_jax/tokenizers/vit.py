"""A small Vision Transformer (arXiv:2010.11929): pre-norm blocks between two norms, scanned over layers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from ar_jax.config import UsageError, choose
from ar_jax.kernels.dense import Dense
from ar_jax.tokenizers.conv import DTYPES


@dataclasses.dataclass(frozen=True)
class ViTSize:
    """Sizes of a transformer.

    Attributes:
      embed_dim: width; the MLPs are four times as wide.
      num_layers: blocks.
      num_heads: a divisor of embed_dim.
      dtype: of the computation, "float32" or "bfloat16".

    Raises:
      UsageError: sizes that do not fit one another.
    """

    embed_dim: int = 512
    num_layers: int = 8
    num_heads: int = 8
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Checks the sizes before anything is traced."""
        choose(DTYPES, self.dtype, "tokenizer.dtype")
        if min(self.embed_dim, self.num_layers, self.num_heads) < 1 or self.embed_dim % self.num_heads:
            raise UsageError(
                f"num_heads={self.num_heads} of the tokenizer's transformers must divide their embed_dim={self.embed_dim}, "
                f"and num_layers={self.num_layers} be at least 1."
            )


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    size: ViTSize

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, None]:
        """[B, T, D] to the same; a scan's body, which gives nothing else."""
        size, dtype = self.size, DTYPES[self.size.dtype]
        dense = functools.partial(Dense, dtype=dtype)
        h = layer_norm(size, "attention_norm")(x)
        q, k, v = (
            dense(size.embed_dim, name=name)(h).reshape(*x.shape[:2], size.num_heads, -1)
            for name in ("query", "key", "value")
        )
        x = x + dense(size.embed_dim, name="out")(jax.nn.dot_product_attention(q, k, v).reshape(x.shape))
        h = dense(4 * size.embed_dim, name="up")(layer_norm(size, "mlp_norm")(x))
        return x + dense(size.embed_dim, name="down")(nn.gelu(h, approximate=False)), None


class Transformer(nn.Module):
    """norm, blocks, norm."""

    size: ViTSize

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, T, D] to [B, T, D]; every token reads all."""
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.size.num_layers)
        x = layer_norm(self.size, "norm_in")(x.astype(DTYPES[self.size.dtype]))
        x, _ = scan(self.size, name="layers")(x)
        return layer_norm(self.size, "norm_out")(x)


def layer_norm(size: ViTSize, name: str) -> nn.LayerNorm:
    """A layer norm; its statistics are in float32."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=DTYPES[size.dtype], name=name)


def table(module: nn.Module, name: str, *shape: int) -> Array:
    """A parameter of learned vectors [..., D], of variance 1 / D."""
    return module.param(name, nn.initializers.normal(shape[-1] ** -0.5), shape, jnp.float32)
