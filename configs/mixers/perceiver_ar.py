"""Text whose last bytes read all others once, and then each other (Perceiver AR, S048, arXiv:2202.07765)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS


def get_config(variant: str = "base") -> ConfigDict:
    """A quarter of the bytes of a window have latents: a run of them, anywhere, is trained in each step.

    `python train.py --config=configs/mixers/perceiver_ar.py:smoke --workdir=DIR`: 40 steps to 5.11 bits per byte held out
    (of scikit-learn's texts). `python benchmarks/long_context.py` times a step over 100,000 inputs.
    """
    config = text.language_model(
        variant, dict(kind="softmax", num_heads=4), learned_positions=False, target_positions=False
    )
    latents = config.data.length // 4
    config.model.update(kind="perceiver_ar", num_latents=latents, cross_after=(0,))
    config.feed = dict(kind="shift")
    config.objective.num_answers = latents
    return config
