"""Addition of numbers of any length (S201, arXiv:2406.00075), learned from numbers of two digits."""

from ml_collections import ConfigDict

from ar_jax.config import choose_variant

VARIANTS = {
    "base": dict(embed_dim=64, num_layers=2, num_heads=2, num_steps=800, warmup_steps=50, batch_size=128),
    "smoke": dict(embed_dim=32, num_layers=1, num_heads=2, num_steps=600, warmup_steps=20, batch_size=128),
}


def get_config(variant: str = "base") -> ConfigDict:
    """Column by column from the right; each digit of a sum reads the four tokens before it, and nothing else.

    These are the column's own digits and the column sum to its right, unit and ten, whose ten is the carry. The network is
    the paper's (base): two layers, width 64, two heads. Not as published: a column is a place on a grid instead of a prompt in
    text, and is solved from the unit to the ten; the operands' digits are generated, too, and given where a sum is asked for;
    optimizer and number of steps are ours.

    `python train.py --config=configs/addition.py:smoke --workdir=DIR`: 600 steps to exact sums, all that are held out:
    those of 2 digits, and of 100 (`other_data` of eval.py). So does the base variant in 800 steps.
    """
    size = choose_variant(VARIANTS, variant)
    config = ConfigDict()
    config.seed = 0
    config.data = dict(kind="addition", num_digits=2)
    config.tokenizer = dict(kind="pixels")
    config.order = dict(kind="right_to_left", columns=True)
    config.feed = dict(kind="recent", num_steps=4)
    config.condition = dict(kind="none")
    config.model = dict(kind="decoder", embed_dim=size["embed_dim"], num_layers=size["num_layers"])
    config.model.update(gated=False, activation="gelu_exact", norm="layer", mlp_bias=True)
    config.model.update(learned_positions=False, target_positions=False, level_positions=True)
    config.model.mixer = dict(kind="softmax", num_heads=size["num_heads"], rope_base=0.0)
    config.head = dict(kind="categorical")
    config.objective = dict(kind="next_token")
    config.optimizer = dict(kind="muon", learning_rate=5e-3, weight_decay=0.01, clip_norm=1.0)
    config.schedule = dict(kind="cosine", warmup_steps=size["warmup_steps"])
    config.train = dict(num_steps=size["num_steps"], batch_size=size["batch_size"], log_every_steps=50)
    config.checkpoint = dict(every_steps=500, keep=3)
    config.sampling = dict(temperature=1.0)
    config.eval = dict(batch_size=100, every_steps=0, data=dict(num_digits=100, num_train=1, num_test=100, seed=1))
    config.mesh = dict(data=-1)
    return config
