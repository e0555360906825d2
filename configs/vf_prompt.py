"""VF prompt (S014, arXiv:2502.16965): an image of tokens is read before the first token of the image is drawn."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant
from configs import llamagen

SIZES, SMALL = ("b", "l", "xl"), ("fashion", "smoke")
# "..._class" shows another image of the class ("class VF prompt"), the others tokens drawn evenly ("universal VF prompt").
VARIANTS = {"base": ("b", False), **{name: (name, False) for name in (*SIZES, *SMALL)}}
VARIANTS |= {"b_class": ("b", True), "smoke_class": ("smoke", True)}


def get_config(variant: str = "base") -> ConfigDict:
    """A prompt of 16 x 16 tokens before LlamaGen-B (base), L and XL on ImageNet at 256 x 256.

    The paper's code was not at hand. From the paper: the two prompts, behind the class, in training and in sampling, and the
    objective, sum_t log p(x_t | x_<t, prompt, class). Our choice: the prompt's tokens are embedded as the image's are and
    stand at the same places, with a learned vector that tells them apart; the first evaluation reads all of the prompt, so
    an image takes 256; where the class is withheld, the prompt stays. Sizes and training are LlamaGen's.

    Any size has class prompts by --config.data.prompts=True, which reads all examples once, at the start. Samples are then to
    be given prompts, `run.sample(labels={"label": labels, "prompt": tokens})`; without them they are drawn evenly.

    `python train.py --config=configs/vf_prompt.py:smoke --workdir=DIR`: 40 steps to 2.48 bits per dimension held out
    (scikit-learn's digits, a token for each pixel).

    `python train.py --config=configs/vf_prompt.py:fashion --workdir=DIR` trains on tokens of Fashion-MNIST in
    runs/shards/vqgan; docs/landmarks.md tells how they are made.
    """
    name, of_class = choose_variant(VARIANTS, variant)
    config = llamagen.get_config(name if name in SMALL else f"{name}_256")
    config.condition = dict(kind="prompt", guidance_dropout_rate=0.1)
    if of_class:
        config.data.prompts = True
    return config
