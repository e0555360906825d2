"""A grid of codes by a convolutional VQGAN (arXiv:2012.09841) with LlamaGen's sizes (arXiv:2406.06525, section 3.1)."""

from typing import Any

from ml_collections import ConfigDict

from ar_jax.config import choose_variant

LLAMAGEN = dict(quantizer=dict(kind="vq", vocab_size=16384, channels=8, l2_norm=True), z_channels=256)
SMALL = dict(hidden_channels=16, num_groups=8, num_res_blocks=1, attention=("middle",), channel_multipliers=(1, 2, 4))
TINY = SMALL | dict(channel_multipliers=(1, 2))
CODES = dict(kind="vq", vocab_size=256, channels=8, l2_norm=True, ema_decay=0.95, revive_below=0.1)
VARIANTS = {
    "base": LLAMAGEN,  # vq-16: a code for 16 x 16 pixels, 16 x 16 codes
    "vq_8": LLAMAGEN | dict(channel_multipliers=(1, 2, 2, 4)),
    "fashion": SMALL | dict(quantizer=CODES),
    "smoke": TINY | dict(quantizer=CODES | dict(vocab_size=64, ema_decay=0.9)),
}
DATA = {
    "fashion": dict(kind="idx"),
    "smoke": dict(kind="digits"),
    "published": dict(kind="tfds", builder="imagenet2012", test_split="validation", image_size=256, flip=True),
}
TRAINING = {  # steps, warm-up, batch size, peak learning rate, decay of the average
    "fashion": (600, 40, 32, 2e-3, 0.99),
    "smoke": (60, 5, 32, 3e-3, 0.9),
    "published": (400_000, 5_000, 128, 1e-4, 0.9999),
}
# Trained weights of VGG16 and of LPIPS: torchvision's vgg16 and the paper's authors' linear layers, as safetensors.
PERCEPTUAL = dict(perceptual_features="vgg16/vgg16.safetensors", perceptual_weights="vgg16/lpips.safetensors")
ADVERSARIAL = dict(adversarial_weight=0.5, adversarial_start=0.05, discriminator=dict(kind="patch"))


def recipe(variant: str, tokenizer: dict[str, Any], objective: dict[str, Any] | None = None) -> ConfigDict:
    """The training of any tokenizer: ImageNet at 256 x 256, or "fashion" or "smoke" on less."""
    scale = variant if variant in DATA else "published"
    num_steps, warmup_steps, batch_size, learning_rate, ema_decay = TRAINING[scale]
    losses = {
        "fashion": dict(l1_weight=1.0, l2_weight=1.0, perceptual_weight=0.1),
        "smoke": dict(l1_weight=1.0, l2_weight=1.0),
        "published": dict(l1_weight=0.0, l2_weight=1.0, perceptual_weight=1.0) | PERCEPTUAL | ADVERSARIAL,
    }[scale]
    config = ConfigDict()
    config.seed = 0
    config.data = dict(DATA[scale])
    config.tokenizer = tokenizer
    config.objective = dict(kind="reconstruction") | losses | (objective or {})
    config.optimizer = dict(kind="adamw", learning_rate=learning_rate, b1=0.9, b2=0.95, weight_decay=0.0, clip_norm=1.0)
    config.schedule = dict(kind="constant" if scale == "published" else "cosine", warmup_steps=warmup_steps)
    config.train = dict(num_steps=num_steps, batch_size=batch_size, log_every_steps=20, ema_decay=ema_decay)
    config.checkpoint = dict(every_steps=5000 if scale == "published" else 500)
    config.eval = dict(batch_size=50 if scale == "published" else 180)
    return config


def get_config(variant: str = "base") -> ConfigDict:
    """LlamaGen's tokenizer of 256 x 256 images; "fashion": 7 x 7 codes of Fashion-MNIST; "smoke": 4 x 4 of the digits."""
    tokenizer = dict(kind="autoencoder") | choose_variant(VARIANTS, variant)
    small = dict(discriminator=dict(kind="patch", hidden_channels=16, num_layers=1), adversarial_start=0.5)
    extra = {"smoke": small | dict(adversarial_weight=0.1, perceptual_weight=0.1)}
    return recipe(variant, tokenizer, extra.get(variant))
