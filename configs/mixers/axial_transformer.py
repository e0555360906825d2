"""Digits row by row, what past rows tell computed once a row (Axial Transformer, S020, arXiv:1912.12180)."""

from ml_collections import ConfigDict

from configs import digits

VARIANTS = digits.VARIANTS | {"video": digits.VARIANTS["base"], "video_smoke": digits.VARIANTS["smoke"]}


def get_config(variant: str = "base") -> ConfigDict:
    """Half of the layers are outer ones, along rows and from row to row, half are inner ones along the row.

    `python train.py --config=configs/mixers/axial_transformer.py:smoke --workdir=DIR`: 40 steps to 2.54 bits per dimension
    held out. `video_smoke`, digits that move through 3 frames of 9 x 9: 40 steps to 2.17.

    In videos the frames are an axis of their own: what past frames tell is computed once a frame, what past rows tell once a
    row.
    """
    video = {"video": "base", "video_smoke": "smoke"}
    config = digits.get_config(video.get(variant, variant))
    config.model.kind = "axial_transformer"
    config.model.outer_layers = config.model.num_layers = config.model.num_layers // 2
    if variant in video:
        config.data = dict(kind="moving_digits", num_frames=3, side=9)
        config.model.slice_shape = (9, 9)
        config.train.batch_size = 32
    return config
