"""Text by attention to the blocks that a gate chooses (SeerAttention-R, S006, arXiv:2506.08889)."""

from ml_collections import ConfigDict

from configs.recipes import text

VARIANTS = text.VARIANTS | {"distill": text.VARIANTS["base"], "distill_smoke": text.VARIANTS["smoke"]}
# DeepSeek-R1-Distill-Qwen-14B, the largest model that the paper sparsifies: by its published config.json.
QWEN_14B = dict(num_layers=48, embed_dim=5120, mlp_dim=13824, dtype="bfloat16", norm_epsilon=1e-5)
QWEN_14B_HEADS = dict(num_heads=40, num_kv_heads=8, head_dim=128, rope_base=1e6, qkv_bias=True)
VARIANTS |= {"qwen_14b": QWEN_14B}


def get_config(variant: str = "base") -> ConfigDict:
    """Blocks of 8 bytes, of which 4 are read; attention and gate learn together, the gate from attention.

    `python train.py --config=configs/mixers/seer_attention.py:smoke --workdir=DIR`: 40 steps to 5.11 bits per byte held out
    (of scikit-learn's texts).

    As published, the gate is distilled from a model that stays as it is: train configs/mixers/loki.py, which is plain softmax
    attention, in SOFTMAX, and then `python train.py --config=configs/mixers/seer_attention.py:distill
    --config.train.init_from=SOFTMAX --workdir=DIR`; sample with `--config.model.mixer.dense=False`.

    `qwen_14b` has a published model's layers (its tokens are bytes here, 2048 at a time), blocks of 64 tokens and a budget of
    64 blocks: the paper's 4K tokens; `--config.model.mixer.block_size=128 --config.model.mixer.num_blocks=32` is its other
    setting, and `--config.model.mixer.threshold=0.005` with more blocks its other way to choose.
    """
    if variant == "qwen_14b":
        config = text.language_model(
            "base", dict(kind="seer_attention", num_blocks=64, block_size=64, **QWEN_14B_HEADS)
        )
        config.model.update(QWEN_14B)
        config.data.length = 2048
        return config
    mixer = dict(kind="seer_attention", num_heads=4, block_size=8, num_blocks=4)
    if not variant.startswith("distill"):
        return text.language_model(variant, mixer)
    config = text.language_model(
        {"distill": "base", "distill_smoke": "smoke"}.get(variant, variant), mixer | dict(dense=True)
    )
    config.objective = dict(kind="gate_distillation")
    config.optimizer.weight_decay = 0.0
    return config
