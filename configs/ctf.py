"""CTF (S065, arXiv:2503.16194): a coarse label for each place, one by one; then the codes of all places at once."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from ar_jax.interop.llamagen import model_config
from configs import llamagen
from configs.recipes import images

# Their table 1: LlamaGen's networks draw the coarse labels; their table 2: LlamaGen-L refines for all of them.
NETWORKS = {"b": ("b", "l"), "l": ("l", "l"), "xl": ("xl", "l")}
SMALL = {"fashion": ("fashion", "fashion"), "smoke": ("smoke", "smoke")}
VARIANTS = {"base": "b", **{name: name for name in (*NETWORKS, *SMALL)}}
NUM_CLUSTERS, NUM_CLUSTERS_SMALL = 512, 32


def get_config(variant: str = "base") -> ConfigDict:
    """CTF on LlamaGen-B (base), L and XL on ImageNet at 256 x 256: 512 coarse labels, 256 + 1 network evaluations an image.

    The paper's code was not at hand. From its tables: sizes, number of clusters, guidance, and the temperature, which is 1.1
    in both stages. Our choice: the refining network is told the class, too, and guided; its codes may be of another cluster
    than the label, which decoding does not look at; both networks are trained in one run, by the sum of their losses. The
    training is LlamaGen's. config.tokenizer.workdir is to name a tokenizer that `python -m ar_jax.cluster` has made.

    `python train.py --config=configs/ctf.py:smoke --workdir=DIR`: 40 steps to 2.49 bits per dimension held out
    (scikit-learn's digits, each grey level a coarse digit and a fine one to base 5; 65 network evaluations an image).

    `python train.py --config=configs/ctf.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/vqgan_clusters, 7 x 7 labels of 32 clusters and as many codes. The tokenizer is that of docs/landmarks.md:
    `python -m ar_jax.cluster --workdir=runs/tokenizers/vqgan --num_clusters=32 --out=runs/tokenizers/vqgan_clusters` and
    `python -m ar_jax.tokenize --workdir=runs/tokenizers/vqgan_clusters --out=runs/shards/vqgan_clusters`.
    """
    name = choose_variant(VARIANTS, variant)
    small = name in SMALL
    first, second = (NETWORKS | SMALL)[name]
    config = llamagen.get_config(first if small else f"{first}_256")
    config.order, config.feed = dict(kind="coarse_to_fine"), dict(kind="refine")
    config.refiner = model_config(**(llamagen.SIZES | llamagen.SMALL)[second], multiple_of=32 if small else 256)
    config.refiner.dropout_rate = 0.1
    if name == "fashion":
        config.data = images.shards("vqgan_clusters")
        config.tokenizer = images.clustered("vqgan", "vqgan_clusters", NUM_CLUSTERS_SMALL)
    elif name == "smoke":
        config.tokenizer = dict(kind="pixels", depth=2)
    if small:
        return config
    config.tokenizer.quantizer.num_clusters = NUM_CLUSTERS
    config.refiner.update(dtype="bfloat16", remat="full")
    config.sampling = dict(temperature=1.1, guidance_scale=2.0)
    return config
