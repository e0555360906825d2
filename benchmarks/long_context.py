"""Seconds and memory of a training step over long inputs: python benchmarks/long_context.py [--lengths 25000 50000 100000].

A Perceiver AR of few latents beside a plain decoder of the same width and depth, float32, one example, on this machine's
own devices. The gradient of all parameters is taken, of a loss on the last `--latents` tokens; the decoder computes all.
Its time grows with the square of the length: it is only run up to `--longest-decoder` tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

from ar_jax.mixers.protocol import Tokens  # noqa: E402
from ar_jax.models.blocks import BlockOptions  # noqa: E402
from ar_jax.models.decoder import Decoder, mixer_pattern  # noqa: E402
from ar_jax.models.perceiver_ar import PerceiverAR  # noqa: E402


def measured(backbone: Any, length: int, latents: int) -> tuple[float, float]:
    """Seconds of a step and MiB of its temporary arrays."""
    step = jnp.arange(length, dtype=jnp.int32)[None]
    tokens = Tokens(step, step[..., None], length, asked=step >= length - latents, num_asked=latents)
    x = jax.random.normal(jax.random.key(0), (1, length, backbone.embed_dim))
    first = tokens.part(slice(0, 2 * latents))
    small = first.replace(asked=first.step >= latents, num_asked=latents)
    params = jax.jit(lambda x: backbone.init(jax.random.key(1), x, small))(x[:, : 2 * latents])

    def loss(params: Any, x: Any, tokens: Tokens) -> Any:
        return jnp.square(backbone.apply(params, x, tokens)[0][:, -latents:]).mean()

    run = jax.jit(jax.value_and_grad(loss)).lower(params, x, tokens).compile()
    jax.block_until_ready(run(params, x, tokens))
    start = time.perf_counter()
    jax.block_until_ready(run(params, x, tokens))
    return time.perf_counter() - start, run.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[12_500, 25_000, 50_000, 100_000])
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--longest-decoder", type=int, default=12_500)
    options = parser.parse_args()
    mixers, blocks = mixer_pattern(dict(kind="softmax", num_heads=4), embed_dim=options.width), BlockOptions()
    kinds = {
        "perceiver_ar": PerceiverAR(
            options.width, mixers, blocks, mixers, num_layers=options.layers, num_latents=options.latents
        ),
        "decoder": Decoder(options.width, mixers, blocks, num_layers=options.layers),
    }
    print(f"{'backbone':14}{'inputs':>9}{'seconds':>10}{'MiB':>9}")
    for name, backbone in kinds.items():
        for length in options.lengths:
            if name == "perceiver_ar" or length <= options.longest_decoder:
                seconds, mib = measured(backbone, length, options.latents)
                print(f"{name:14}{length:9}{seconds:10.2f}{mib:9.0f}", flush=True)


if __name__ == "__main__":
    main()
