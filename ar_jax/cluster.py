"""Clusters the codes of a trained tokenizer: python -m ar_jax.cluster --workdir=DIR --out=CLUSTERED [--num_clusters=512].

DIR is the run of a tokenizer with quantizer "vq". CLUSTERED is the run of the same tokenizer with two codes for each latent,
the cluster of its vector and the vector, as configs/ctf.py generates them; `python -m ar_jax.tokenize` takes it as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from ar_jax import command
from ar_jax.config import UsageError
from ar_jax.tokenizer_system import TokenizerRun, tokenizer_from_config
from ar_jax.tokenizers.clusters import kmeans, nearest_centroid
from ar_jax.tokenizers.quantizers.codebook import normalized
from ar_jax.tokenizers.quantizers.vq import VectorQuantizer
from ar_jax.training.workdir import plain_values, read_config


def clustered(run: TokenizerRun, num_clusters: int) -> TokenizerRun:
    """The same tokenizer with a coarse label for each code, by k-means on the codebook (arXiv:2503.16194, sec. 4.1).

    Args:
      run: a tokenizer with quantizer "vq" and no clusters. Vectors are clustered as they are compared: of unit length where
        the quantizer has l2_norm.
      num_clusters: coarse labels.

    Raises:
      UsageError: another quantizer, or a number of clusters that does not fit.
    """
    quantizer = run.system.tokenizer.network.quantizer
    if not isinstance(quantizer, VectorQuantizer) or quantizer.num_clusters:
        raise UsageError(
            "Clusters are made of the table of quantizer 'vq' that has none yet; train one, as configs/tokenizers/vqgan.py."
        )
    if not 2 <= num_clusters <= quantizer.vocab_size:
        raise UsageError(f"num_clusters={num_clusters} must lie between 2 and the {quantizer.vocab_size} codes.")
    config = ConfigDict(plain_values(run.config))
    config.tokenizer.quantizer.update(num_clusters=num_clusters, ema_decay=0.0, revive_below=0.0)
    embedding = jnp.asarray(run.params["tokenizer"]["quantizer"]["codebook"]["embedding"])
    vectors = normalized(embedding) if quantizer.l2_norm else embedding
    centroids = kmeans(vectors, jax.random.key(config.seed), num_clusters)
    table = {"codebook": {"embedding": embedding}, "centroids": centroids}
    params = run.params | {"tokenizer": run.params["tokenizer"] | {"quantizer": table}}
    return TokenizerRun(tokenizer_from_config(config, run.system.facts), params, config, run.step)


def main(arguments: Sequence[str]) -> None:
    """The command."""
    from ar_jax.interop.workdirs import write_run
    from ar_jax.run import load

    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "the directory to make", flag_values=values, required=True)
    flags.DEFINE_integer("num_clusters", 512, "coarse labels", flag_values=values)
    config, workdir = command.parse(values(arguments, known_only=True), read_config)
    out = Path(values.out)
    if out.exists():
        raise UsageError(f"{out} exists; choose another --out.")
    run = load(workdir, config)
    if not isinstance(run, TokenizerRun):
        raise UsageError(f"{workdir} holds no tokenizer; train one, such as configs/tokenizers/vqgan.py.")
    made = clustered(run, values.num_clusters)
    table = made.params["tokenizer"]["quantizer"]
    vectors = jnp.asarray(table["codebook"]["embedding"])
    vectors = normalized(vectors) if made.system.tokenizer.network.quantizer.l2_norm else vectors
    sizes = np.bincount(np.asarray(nearest_centroid(vectors, table["centroids"])), minlength=values.num_clusters)
    out.mkdir(parents=True)
    write_run(out, made.config, made.system, made.system.facts, jax.device_get(made.params))
    print(
        f"cluster: {out} has {len(vectors)} codes in {(sizes > 0).sum()} clusters of {sizes.min()} to {sizes.max()} codes"
    )


if __name__ == "__main__":
    command.call(main)
