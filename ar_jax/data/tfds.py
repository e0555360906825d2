"""Image data sets of tensorflow_datasets through its random-access `data_source`; TensorFlow itself is not needed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ar_jax.config import UsageError, nearest
from ar_jax.data.arrays import to_signed_unit
from ar_jax.data.files import resolve
from ar_jax.data.protocol import Dataset, Example, Facts


@dataclasses.dataclass(frozen=True)
class Records:
    """A source of images decoded when asked for: `records[i]` is a dict with uint8 [h, w, C] and an integer."""

    records: Any
    image_key: str
    label_key: str
    image_size: int

    def __len__(self) -> int:
        """The number of images."""
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        """`image` float32 [H, W, C] in [-1, 1] and `label` int32 []."""
        record = self.records[int(index)]
        image = record[self.image_key]
        image = crop_and_resize(image, self.image_size) if self.image_size else image
        label = record[self.label_key] if self.label_key else 0
        return {"image": to_signed_unit(image, levels=256), "label": np.asarray(label, np.int32)}

    def take(self, indices: np.ndarray) -> Example:
        """`image` float32 [B, H, W, C] in [-1, 1] and `label` int32 [B]."""
        examples = [self[index] for index in indices]
        return {key: np.stack([example[key] for example in examples]) for key in ("image", "label")}


def load_tfds(
    builder: str,
    data_dir: str = "",
    train_split: str = "train",
    test_split: str = "test",
    image_key: str = "image",
    label_key: str = "label",
    image_size: int = 0,
) -> Dataset:
    """A data set that tensorflow_datasets has prepared in the array_record (or parquet) format.

    Args:
      builder: its name, with configuration and version if wanted: "cifar10", "imagenet_resized/64x64:0.1.0".
      data_dir: where it was prepared; "" is tensorflow_datasets' own place ($TFDS_DATA_DIR or ~/tensorflow_datasets).
      train_split: the split to train on, slices such as "train[:90%]" included.
      test_split: the split held out.
      image_key: the feature with the uint8 images.
      label_key: the feature with the classes, "" for none.
      image_size: crop the centre square and resize it to this many pixels a side; 0 leaves images as they are.

    Raises:
      UsageError: the builder, its files, a split or a feature is missing or unusable.
    """
    found = _builder(builder, data_dir)
    if not found.info.splits:
        raise UsageError(
            f"TFDS {builder!r} is not prepared in {found.data_dir}; run `tfds build {builder} --file_format=array_record` "
            "once (on any machine with TensorFlow) and set config.data.data_dir."
        )
    facts = _facts(found, builder, image_key, label_key, image_size)
    train, test = (
        Records(_records(found, builder, option, split), image_key, label_key, image_size)
        for option, split in [("train_split", train_split), ("test_split", test_split)]
    )
    return Dataset(facts.modality, facts.shape, train=train, test=test, label_names=facts.label_names)


def tfds_facts(
    builder: str,
    data_dir: str = "",
    train_split: str = "train",
    test_split: str = "test",
    image_key: str = "image",
    label_key: str = "label",
    image_size: int = 0,
) -> Facts:
    """What `load_tfds` would load, by what the builder says of itself: nothing need be prepared."""
    return _facts(_builder(builder, data_dir), builder, image_key, label_key, image_size)


def _facts(found: Any, builder: str, image_key: str, label_key: str, image_size: int) -> Facts:
    features = found.info.features
    for option, key in [("image_key", image_key), ("label_key", label_key)]:
        if key not in features and (key or option == "image_key"):
            hint = f"{nearest(key, features)} It has: {', '.join(features)}."
            raise UsageError(f"TFDS {builder!r} has no config.data.{option}={key!r}.{hint}")
    height, width, channels = (size or image_size for size in _image_shape(builder, features[image_key]))
    if not height or not width:
        raise UsageError(f"TFDS {builder!r} has images of different sizes; set config.data.image_size, such as 64.")
    shape = (image_size, image_size, channels) if image_size else (height, width, channels)
    names = getattr(features[label_key], "names", None) if label_key else ()
    if names is None:
        raise UsageError(
            f"TFDS {builder!r}: {label_key!r} is no class label; set config.data.label_key, or '' for none."
        )
    return Facts("image", shape, label_names=tuple(names))


def crop_and_resize(image: np.ndarray, size: int) -> np.ndarray:
    """The centre square of an image uint8 [h, w, C], as uint8 [size, size, C]."""
    from PIL import Image

    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = image[top : top + side, left : left + side]
    if side == size:
        return square
    channels = [Image.fromarray(channel) for channel in np.moveaxis(square, -1, 0)]
    resized = [channel.resize((size, size), Image.Resampling.BICUBIC) for channel in channels]
    return np.stack([np.asarray(channel) for channel in resized], axis=-1)


def _builder(name: str, data_dir: str) -> Any:
    """The builder, whether or not it is prepared."""
    import tensorflow_datasets as tfds  # here, because it takes seconds to import

    folder = str(resolve(data_dir)) if data_dir else None
    try:
        builder = tfds.builder(name, data_dir=folder)
    except tfds.core.DatasetNotFoundError as error:
        where = folder or "the default data_dir"
        raise UsageError(
            f"TFDS has no config.data.builder={name!r}, nor is one in {where}; choose one of its catalogue."
            f"{nearest(name, tfds.list_builders(with_community_datasets=False))}"
        ) from error
    except (ValueError, AssertionError) as error:
        raise UsageError(
            f"config.data.builder={name!r} is not usable ({_first_line(error)}); write name[/config][:version]."
        ) from error
    return builder


def _records(builder: Any, name: str, option: str, split: str) -> Any:
    """Random access to one split; its ends are read at once, so that broken files are told before training."""
    try:
        records = builder.as_data_source(split=split)
        if not len(records):
            raise ValueError("empty")
    except NotImplementedError as error:
        raise UsageError(
            f"TFDS {name!r} in {builder.data_dir} has no random access; prepare it with `--file_format=array_record`."
        ) from error
    except (ValueError, KeyError) as error:
        base, splits = split.split("[")[0], builder.info.splits
        hint = "" if base in splits else nearest(base, splits)
        raise UsageError(
            f"TFDS {name!r}: config.data.{option}={split!r} is empty or unknown.{hint} It has: {', '.join(splits)}."
        ) from error
    try:
        _ = records[0], records[len(records) - 1]
    except Exception as error:  # whatever the reader or a decoder raises
        raise UsageError(
            f"TFDS {name!r}, {split!r}, in {builder.data_dir} is not readable ({_first_line(error)}); prepare it again."
        ) from error
    return records


def _image_shape(name: str, feature: Any) -> tuple[int | None, int | None, int]:  # sizes that differ are None
    shape = feature.shape
    if len(shape) != 3 or np.dtype(feature.np_dtype) != np.uint8 or not shape[-1]:
        raise UsageError(f"TFDS {name!r}: {feature!r} is not a uint8 image; set config.data.image_key.")
    return shape


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
