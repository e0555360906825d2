"""Text by attention to the blocks that a gate chooses (SeerAttention-R, S006, arXiv:2506.08889)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS | {"distill": text.VARIANTS["base"], "distill_smoke": text.VARIANTS["smoke"]}


def get_config(variant: str = "base") -> ConfigDict:
    """Blocks of 8 bytes, of which 4 are read; attention and gate learn together, the gate from attention.

    `python train.py --config=configs/mixers/seer_attention.py:smoke --workdir=DIR`: 40 steps to 5.11 bits per byte held out
    (of scikit-learn's texts).

    As published, the gate is distilled from a model that stays as it is: train configs/mixers/loki.py, which is plain softmax
    attention, in SOFTMAX, and then `python train.py --config=configs/mixers/seer_attention.py:distill
    --config.train.init_from=SOFTMAX --workdir=DIR`; sample with `--config.model.mixer.dense=False`.
    """
    mixer = dict(kind="seer_attention", num_heads=4, block_size=8, num_blocks=4)
    if not variant.startswith("distill"):
        return text.language_model(variant, mixer)
    config = text.language_model(
        {"distill": "base", "distill_smoke": "smoke"}.get(variant, variant), mixer | dict(dense=True)
    )
    config.objective = dict(kind="gate_distillation")
    config.optimizer.weight_decay = 0.0
    return config
