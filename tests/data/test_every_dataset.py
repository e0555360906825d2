"""What every kind of data promises, and what every kind says when its files are not usable."""

import gzip
import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from ar_jax.config import UsageError, build
from ar_jax.data import DATASETS, pipeline
from ar_jax.data.protocol import Facts
from ar_jax.data.token_shards import Meta, new_folder, write_meta, write_split

REPOSITORY = Path(__file__).resolve().parents[2]
RANDOM = np.random.default_rng(0)


def write_idx(path, values):
    content = (
        struct.pack(">I", 0x0800 | values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    )
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def make_idx(folder):
    for part, count, suffix in [("train", 30, ".gz"), ("t10k", 11, "")]:
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", RANDOM.integers(0, 256, (count, 6, 5), np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8) % 3)
    return dict(kind="idx", folder=str(folder), label_names=("shirt", "bag", "boot"))


def make_npz(folder):
    images = RANDOM.integers(0, 256, (20, 4, 4, 3), np.uint8)
    labels = np.arange(20)[:, None] % 4
    np.savez_compressed(
        folder / "a.npz", x_train=images[:14], y_train=labels[:14], x_test=images[14:], y_test=labels[14:]
    )
    return dict(kind="npz", path=str(folder / "a.npz"))


def make_text(folder):
    (folder / "a.txt").write_bytes(bytes(RANDOM.integers(0, 256, 999, np.uint8)))
    (folder / "b.txt").write_text("ünïcödé" * 20)
    return dict(kind="text", path=[str(folder / "a.txt"), str(folder / "b.txt")], length=10, test_fraction=0.2)


def png(image):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    return file


def make_tfds(folder):
    """A real builder on disk. Its images are given as PNG files: only encoding arrays would need TensorFlow."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    with registered.skip_registration():  # so that it is found by its files alone

        class TinyShapes(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = folder

            def _info(self):
                image = tfds.features.Image(shape=(None, None, 3))
                label = tfds.features.ClassLabel(names=["round", "square"])
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(dict(image=image, label=label))
                )

            def _split_generators(self, download_manager):
                return {"train": self._generate_examples(9), "test": self._generate_examples(5)}

            def _generate_examples(self, count):
                for i in range(count):
                    yield i, {"image": png(np.full((6 + i, 8, 3), 10 * i, np.uint8)), "label": i % 2}

    TinyShapes(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return dict(kind="tfds", builder="tiny_shapes", data_dir=str(folder), image_size=6)


def make_token_shards(folder, vocab_size=70000, shape=(6,), dtype="int32"):
    facts, counts = Facts("image", (8, 8, 1), 17, ("cat", "dog")), {"train": 9, "test": 5}
    meta = Meta(facts, shape, dtype, ((2, 3),), vocab_size, counts, tokenizer={})
    with new_folder(folder / "shards") as made:
        for split, count in counts.items():
            tokens = RANDOM.integers(0, max(vocab_size, 2), (count, *shape))
            write_split(made, split, [(tokens[:4], np.arange(4) % 2), (tokens[4:], np.arange(4, count) % 2)], meta)
        write_meta(made, meta)
    return dict(kind="token_shards", path=str(folder / "shards"))


def make_crops(folder):
    """A moving picture of six frames: four to learn from, two held out."""
    from PIL import Image

    frames = [Image.fromarray(RANDOM.integers(0, 256, (9, 13, 3), np.uint8)) for _ in range(6)]
    frames[0].save(folder / "a.png", save_all=True, append_images=frames[1:])
    return dict(kind="crops", path=[str(folder / "a.png")], num_frames=2, height=4, width=3, test_fraction=0.3)


MAKERS = {
    "digits": lambda folder: dict(kind="digits"),
    "idx": make_idx,
    "npz": make_npz,
    "text": make_text,
    "tfds": make_tfds,
    "token_shards": make_token_shards,
    "addition": lambda folder: dict(kind="addition", num_digits=3, num_train=40, num_test=12),
    "molecules": lambda folder: dict(kind="molecules", max_atoms=5, limit=150),
    "moving_digits": lambda folder: dict(kind="moving_digits", num_frames=3, side=9),
    "crops": make_crops,
    "episodes": lambda folder: dict(kind="episodes", environment=dict(kind="cart_pole"), num_train=30, num_test=7),
    "listops": lambda folder: dict(kind="listops", min_length=4, max_length=20, max_depth=3, num_train=40, num_test=9),
}
FACTS = {  # train and test examples, shape, levels, classes
    "digits": (1437, 360, (8, 8, 1), 17, 10),
    "idx": (30, 11, (6, 5, 1), 256, 3),
    "npz": (14, 6, (4, 4, 3), 256, 4),
    "text": ((999 + 11 * 20 - 244) // 10, 24, (10,), 256, 0),
    "tfds": (9, 5, (6, 6, 3), 256, 2),
    "token_shards": (9, 5, (8, 8, 1), 17, 2),  # of the images that the tokens were
    "addition": (40, 12, (4, 3, 1), 10, 0),
    "molecules": (135, 15, (5, 5, 1), 7, 0),
    "moving_digits": (1437, 360, (3, 9, 9, 1), 17, 10),
    "crops": (2 * 2 * 4, 2 * 4, (2, 4, 3, 1), 256, 1),
    "listops": (40, 9, (20,), 16, 10),
    "episodes": (30, 7, (2,), 256, 0),
}


@pytest.fixture(params=MAKERS)
def made(request, tmp_path):
    return request.param, build(DATASETS, MAKERS[request.param](tmp_path), "data")


def test_files_of_text_can_be_classes(tmp_path):
    (tmp_path / "en.txt").write_bytes(bytes(range(50)))
    (tmp_path / "de.txt.gz").write_bytes(gzip.compress(bytes(range(100, 200))))
    paths = [str(tmp_path / name) for name in ("en.txt", "de.txt.gz")]
    data = build(DATASETS, dict(kind="text", path=paths, length=5, test_fraction=0.2, label_files=True), "data")
    assert data.label_names == ("en", "de.txt") and (len(data.train), len(data.test)) == (8 + 16, 2 + 4)
    for source, starts in ((data.train, (0, 100)), (data.test, (40, 180))):
        batch = source.take(np.arange(len(source)))
        assert batch["label"].dtype == np.int32 and sorted(set(batch["label"].tolist())) == [0, 1]
        assert ((batch["text"] >= 100).all(axis=1) == batch["label"]).all()
        assert [batch["text"][batch["label"] == i][0, 0] for i in (0, 1)] == list(starts)
    with pytest.raises(UsageError, match="en.txt.*do not both fill a window of 30"):
        build(DATASETS, dict(kind="text", path=paths, length=30, label_files=True), "data")


def test_every_kind_is_tested():
    assert set(MAKERS) == set(FACTS) == set(DATASETS)


def test_facts_are_as_written(made):
    kind, data = made
    assert (len(data.train), len(data.test), data.shape, data.levels, data.num_classes) == FACTS[kind]
    assert len(data.label_names) == data.num_classes


def test_examples_have_the_promised_types_and_ranges(made):
    _, data = made
    for source in (data.train, data.test):
        for example in (source[0], source[len(source) - 1]):
            if data.modality == "text":
                assert example.keys() - {"label"} == {"text"} and ("label" in example) == (data.num_classes > 0)
                assert example["text"].shape == data.shape and example["text"].dtype == np.uint8
            elif data.modality == "episodes":
                assert example.keys() == {"seed"}
                assert example["seed"].shape == () and example["seed"].dtype == np.int32
            elif "tokens" in example:
                assert example.keys() == {"tokens", "label"}
                assert example["tokens"].shape == (6,) and example["tokens"].dtype == np.int32
            else:
                assert example.keys() == {data.modality, "label"}
                shown = example[data.modality]
                assert shown.shape == data.shape and shown.dtype == np.float32
                assert -1 <= shown.min() and shown.max() <= 1
            if "label" in example:
                assert example["label"].shape == () and example["label"].dtype == np.int32
                assert 0 <= example["label"] < max(data.num_classes, 1)


def test_pixels_lie_on_the_levels(made):
    _, data = made
    if data.modality in ("image", "video") and data.modality in data.train[0]:
        images = data.train.take(np.arange(len(data.train)))[data.modality]
        levels = (images + 1) / 2 * (data.levels - 1)
        np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)  # float32 around 255
        assert np.ptp(np.round(levels)) > 0


def test_taking_many_is_taking_each(made):
    _, data = made
    indices = np.array([3, 0, len(data.train) - 1, 3])
    many = data.train.take(indices)
    for row, index in enumerate(indices):
        for key, value in data.train[index].items():
            np.testing.assert_array_equal(many[key][row], value)
            assert many[key].dtype == value.dtype


def test_a_position_resumes_exactly(made):
    _, data = made
    size = len(data.train) // 2 + 1
    iterator = pipeline.train_iterator(data, size, seed=1)
    next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    again = pipeline.train_iterator(data, size, seed=1)
    again.set_state(state)
    for _ in range(3):
        expected, got = next(iterator), next(again)
        assert expected.keys() == got.keys()
        for key in expected:
            np.testing.assert_array_equal(expected[key], got[key])


def test_the_last_digits_are_held_out():
    from sklearn.datasets import load_digits

    data = build(DATASETS, dict(kind="digits"), "data")
    test = data.test.take(np.arange(360))
    np.testing.assert_array_equal((test["image"][..., 0] + 1) * 8, load_digits().images[1437:])
    np.testing.assert_array_equal(test["label"], load_digits().target[1437:])


def test_text_windows_are_the_text_in_order_and_the_end_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(100)))
    data = build(DATASETS, dict(kind="text", path=str(tmp_path / "a.txt"), length=8), "data")
    np.testing.assert_array_equal(data.train.take(np.arange(11))["text"].ravel(), np.arange(88))
    np.testing.assert_array_equal(data.test[0]["text"], np.arange(90, 98))


def test_images_without_labels_have_no_classes(tmp_path):
    np.savez(tmp_path / "a.npz", left=np.zeros((3, 2, 2), np.uint8), right=np.zeros((1, 2, 2), np.uint8))
    options = dict(kind="npz", path=str(tmp_path / "a.npz"), train_image_key="left", test_image_key="right")
    data = build(DATASETS, options, "data")
    assert data.num_classes == 0 and data.train[0]["label"] == 0


def test_tfds_images_are_cropped_to_the_centre_and_resized(tmp_path):
    from ar_jax.data.tfds import crop_and_resize

    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = [10, 20, 30]
    np.testing.assert_array_equal(crop_and_resize(image, 4), image[:, 2:6])
    np.testing.assert_array_equal(crop_and_resize(image, 2), image[:2, 2:4])
    assert crop_and_resize(image[..., :1], 9).shape == (9, 9, 1)


def test_paths_may_start_at_home_in_a_variable_or_at_the_data_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"x" * 99)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    monkeypatch.setenv("AR_JAX_DATA", str(tmp_path))
    for path in ["~/a.txt", "$SOMEWHERE/a.txt", "a.txt"]:
        assert len(build(DATASETS, dict(kind="text", path=path, length=9), "data").train) == 9
    monkeypatch.delenv("AR_JAX_DATA")
    monkeypatch.chdir(tmp_path)
    assert len(build(DATASETS, dict(kind="text", path="a.txt", length=9), "data").train) == 9


def truncate(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def damage_idx(name, change):
    def make(folder):
        options = make_idx(folder)
        change(folder / name)
        return options

    return make


def npz(**arrays):
    def make(folder):
        np.savez(folder / "a.npz", **arrays)
        return dict(kind="npz", path=str(folder / "a.npz"))

    return make


def file(kind, key, content, **options):
    def make(folder):
        (folder / "a").write_bytes(content)
        return dict(kind=kind, **{key: str(folder / "a")}, **options)

    return make


def altered(maker, **changes):
    return lambda folder: maker(folder) | changes


def lone_array(folder):
    np.save(folder / "a.npy", IMAGES)
    return dict(kind="npz", path=str(folder / "a.npy"))


def damage_npz(folder):
    options = make_npz(folder)
    truncate(folder / "a.npz")
    return options


def damage_tfds(folder):
    options = make_tfds(folder)
    for path in folder.glob("tiny_shapes/*/*train.array_record*"):
        truncate(path)
    return options


def damage_token_shards(pattern, change):
    def make(folder):
        options = make_token_shards(folder)
        for path in (folder / "shards").glob(pattern):
            change(path)
        return options

    return make


def damage_crops(folder):
    options = make_crops(folder)
    truncate(folder / "a.png", 0.9)
    return options


def empty_tfds(folder):
    return dict(kind="tfds", builder="mnist", data_dir=str(folder))


IMAGES, LABELS = np.zeros((4, 2, 2), np.uint8), np.arange(4)
OBJECTS = np.empty(4, object)
BAD = {  # name: (what is wrong, what the sentence says)
    "unknown kind": (lambda _: dict(kind="digit"), "Did you mean 'digits'"),
    "unknown key": (lambda _: dict(kind="text", pth="a"), "Did you mean 'path'"),
    "idx folder missing": (lambda folder: dict(kind="idx", folder=str(folder / "no")), "dataset-fashion-mnist"),
    "idx file missing": (damage_idx("t10k-labels-idx1-ubyte", Path.unlink), "has no t10k-labels-idx1-ubyte"),
    "idx file empty": (damage_idx("t10k-labels-idx1-ubyte", lambda path: truncate(path, 0)), "is empty"),
    "idx header cut": (damage_idx("t10k-labels-idx1-ubyte", lambda path: truncate(path, 0.3)), "is not an idx file"),
    "idx values cut": (damage_idx("t10k-images-idx3-ubyte", truncate), "truncated"),
    "idx gzip cut": (damage_idx("train-images-idx3-ubyte.gz", truncate), "not a complete gzip"),
    "idx not gzip": (
        damage_idx("train-images-idx3-ubyte.gz", lambda path: path.write_bytes(b"hello")),
        "not a complete",
    ),
    "idx not idx": (damage_idx("t10k-images-idx3-ubyte", lambda path: path.write_bytes(b"hello")), "not an idx file"),
    "idx label out of range": (altered(make_idx, label_names=("a", "b")), "has label 2, outside 0 … 1"),
    "npz missing": (lambda folder: dict(kind="npz", path=str(folder / "no.npz")), "does not exist"),
    "npz is a folder": (lambda folder: dict(kind="npz", path=str(folder)), "not a complete .npz"),
    "npz empty": (file("npz", "path", b""), "not a complete .npz"),
    "npz is text": (file("npz", "path", b"hello"), "not a complete .npz"),
    "npz is a lone array": (lone_array, "not a complete .npz"),
    "npz truncated": (damage_npz, "not a complete .npz"),
    "npz pickled": (npz(x_train=OBJECTS, x_test=IMAGES), "plain arrays"),
    "npz without images": (
        npz(a=IMAGES, b=IMAGES),
        "has no train_images; set config.data.train_image_key to one of: a, b",
    ),
    "npz key misspelt": (altered(make_npz, train_image_key="x_trian"), "Did you mean 'x_train'"),
    "npz floats": (npz(x_train=IMAGES / 2, x_test=IMAGES), "save them as uint8"),
    "npz no images": (npz(x_train=IMAGES[:0], x_test=IMAGES), "has no images"),
    "npz channels first": (npz(x_train=np.zeros((9, 3, 8, 8), np.uint8), x_test=IMAGES), "[N, H, W, C]"),
    "npz shapes differ": (npz(x_train=IMAGES, x_test=IMAGES[:, :1]), "the same height"),
    "npz labels too few": (npz(x_train=IMAGES, y_train=LABELS[1:], x_test=IMAGES, y_test=LABELS), "one integer label"),
    "npz labels real": (npz(x_train=IMAGES, y_train=LABELS / 2, x_test=IMAGES, y_test=LABELS), "one integer label"),
    "npz labels half": (npz(x_train=IMAGES, y_train=LABELS, x_test=IMAGES), "only one of train and test"),
    "npz label out of range": (npz(x_train=IMAGES, y_train=LABELS, x_test=IMAGES, y_test=LABELS + 1), "has label 4"),
    "npz label negative": (npz(x_train=IMAGES, y_train=LABELS - 1, x_test=IMAGES, y_test=LABELS), "has label -1"),
    "names without labels": (altered(npz(x_train=IMAGES, x_test=IMAGES), label_names=("a",)), "has no labels"),
    "text missing": (lambda folder: dict(kind="text", path=str(folder / "no.txt")), "does not exist"),
    "text no path": (lambda folder: dict(kind="text", path=""), "'' is not a path"),
    "text path is a number": (lambda _: dict(kind="text", path=[3]), "config.data.path=[3] has the wrong type"),
    "npz path is a number": (lambda _: dict(kind="npz", path=3), "config.data.path=3 has the wrong type"),
    "text no paths": (lambda folder: dict(kind="text", path=[]), "an empty list"),
    "text is a folder": (lambda folder: dict(kind="text", path=str(folder)), "cannot be read"),
    "text empty": (file("text", "path", b""), "is empty"),
    "text short": (file("text", "path", b"hello"), "reduce config.data.length"),
    "text length": (file("text", "path", b"hello", length=0), "length of 1 or more"),
    "text fraction": (file("text", "path", b"hello", test_fraction=1.0), "between 0 and 1"),
    "tfds unknown": (lambda folder: dict(kind="tfds", builder="cifar11", data_dir=str(folder)), "Did you mean 'cifar"),
    "tfds malformed": (lambda folder: dict(kind="tfds", builder="mnist/a:b:c"), "name[/config][:version]"),
    "tfds not prepared": (empty_tfds, "tfds build mnist --file_format=array_record"),
    "tfds split": (altered(make_tfds, test_split="tets"), "Did you mean 'test'"),
    "tfds split empty": (altered(make_tfds, test_split="test[:0]"), "is empty or unknown. It has: train, test"),
    "tfds image key": (altered(make_tfds, image_key="imgae"), "Did you mean 'image'"),
    "tfds no image key": (altered(make_tfds, image_key=""), "has no config.data.image_key=''"),
    "tfds image not image": (altered(make_tfds, image_key="label"), "is not a uint8 image"),
    "tfds label not label": (altered(make_tfds, label_key="image"), "is no class label"),
    "tfds sizes differ": (altered(make_tfds, image_size=0), "set config.data.image_size"),
    "tfds truncated": (damage_tfds, "is not readable"),
    "digits that stay in no canvas": (lambda _: dict(kind="moving_digits", side=7), "side=7 at least 8"),
    "crops missing": (lambda folder: dict(kind="crops", path=str(folder / "no.png")), "does not exist"),
    "crops of text": (file("crops", "path", b"hello"), "is no picture"),
    "crops cut": (damage_crops, "cannot be read"),
    "crops too large": (altered(make_crops, height=10), "fill no box of (2, 10, 3)"),
    "crops of no pixels": (lambda _: dict(kind="crops", width=0), "width=0 must be at least 1"),
    "crops held out": (lambda _: dict(kind="crops", test_fraction=1.0), "must lie between 0 and 1"),
    "tokens missing": (lambda folder: dict(kind="token_shards", path=str(folder / "no")), "python -m ar_jax.tokenize"),
    "tokens no folder of tokens": (lambda folder: dict(kind="token_shards", path=str(folder)), "has no tokens.json"),
    "tokens facts cut": (damage_token_shards("tokens.json", truncate), "tokens.json cannot be read"),
    "tokens shard missing": (damage_token_shards("test-*", Path.unlink), "has no readable test-*.array_record"),
    "tokens shard cut": (damage_token_shards("train-*", truncate), "has no readable train-*.array_record"),
}


@pytest.mark.parametrize("name", BAD)
def test_unusable_data_is_told_in_one_sentence(name, tmp_path):
    make, says = BAD[name]
    options = make(tmp_path)
    with pytest.raises(UsageError) as raised:
        build(DATASETS, options, "data")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def shared_data():
    folder = Path(os.environ.get("AR_JAX_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set AR_JAX_DATA to the folder that holds it")
    return folder


@pytest.mark.parametrize(
    ("options", "place", "facts"),
    [
        (dict(kind="idx"), ("folder", "mnist"), (60000, 10000, (28, 28, 1), 10)),
        (dict(kind="npz"), ("path", "cifar10/cifar10_first4000_first1000.npz"), (4000, 1000, (32, 32, 3), 10)),
        (dict(kind="npz"), ("path", "medmnist/pneumoniamnist.npz"), (4708, 624, (28, 28, 1), 2)),
        (dict(kind="text", length=256), ("path", "tiny_shakespeare/input.txt"), (3921, 435, (256,), 0)),
        (dict(kind="crops", height=64, width=96), ("path", "kodak/kodim01.png"), (48, 8, (64, 96, 1), 1)),
    ],
    ids=["mnist", "cifar10", "medmnist", "shakespeare", "kodak"],
)
def test_known_files_are_read(options, place, facts):
    if not (shared_data() / place[1]).exists():
        pytest.skip(f"{place[1]} is not in {shared_data()}")
    data = build(DATASETS, options | {place[0]: str(shared_data() / place[1])}, "data")
    assert (len(data.train), len(data.test), data.shape, data.num_classes) == facts
