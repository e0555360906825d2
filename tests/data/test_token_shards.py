import numpy as np
import pytest

from ar_jax.config import UsageError
from ar_jax.data import pipeline, token_shards
from ar_jax.data.protocol import Facts
from ar_jax.data.token_shards import Meta, load_token_shards, new_folder, write_meta, write_split


def meta(shape, dtype, vocab_size, counts):
    return Meta(Facts("image", (8, 8, 1), 17, ("a", "b")), shape, dtype, ((4,),), vocab_size, counts, {"digest": "1f"})


def write(folder, what, tokens):
    with new_folder(folder) as part:
        for split in ("train", "test"):
            write_split(part, split, [(tokens, np.arange(len(tokens)) % 2)], what)
        write_meta(part, what)


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "shape"),
    [("uint16", 65536, (4,)), ("int32", 70000, (4,)), ("float32", 0, (4, 3)), ("float16", 0, (4, 3))],
)
def test_what_is_read_is_what_was_written_over_several_shards(tmp_path, monkeypatch, dtype, vocab_size, shape):
    monkeypatch.setattr(token_shards, "RECORDS_PER_SHARD", 3)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, (7, *shape)) if vocab_size else rng.normal(size=(7, *shape)).astype(dtype)
    what = meta(shape, dtype, vocab_size, {"train": 7, "test": 7})
    write(tmp_path / "shards", what, tokens)
    assert len(list((tmp_path / "shards").glob("train-*-of-00003.array_record"))) == 3
    data = load_token_shards(str(tmp_path / "shards"))
    assert data.train.meta == what and data.shape == (8, 8, 1) and data.label_names == ("a", "b")
    read = data.train.take(np.arange(7))
    np.testing.assert_array_equal(read["tokens"], tokens)
    np.testing.assert_array_equal(read["label"], np.arange(7) % 2)
    assert read["tokens"].dtype == (np.int32 if vocab_size else np.float32)


def test_the_same_tokens_give_the_same_bytes(tmp_path):
    tokens, what = np.arange(20).reshape(5, 4), meta((4,), "uint16", 99, {"train": 5, "test": 5})
    for name in ("a", "b"):
        write(tmp_path / name, what, tokens)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_folder_is_there_whole_or_not_at_all_and_never_overwritten(tmp_path):
    tokens, what = np.arange(20).reshape(5, 4), meta((4,), "uint16", 99, {"train": 5, "test": 5})
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a") as part:
        write_split(part, "train", [(tokens, np.zeros(5))], what)
        raise KeyboardInterrupt
    assert not (tmp_path / "a").exists()
    write(tmp_path / "a", what, tokens)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(UsageError, match="a exists; remove it, or choose another --out"):
        write(tmp_path / "a", what, tokens)


def test_records_of_another_size_than_promised_are_refused(tmp_path):
    tokens, what = np.arange(20).reshape(5, 4), meta((4,), "uint16", 99, {"train": 5, "test": 5})
    write(tmp_path / "a", what, tokens)
    write_meta(tmp_path / "a", meta((8,), "uint16", 99, {"train": 5, "test": 5}))
    with pytest.raises(UsageError, match="5 train records of 12 bytes, but tokens.json says 5 of 20"):
        load_token_shards(str(tmp_path / "a"))


def test_tokens_cannot_be_mirrored(tmp_path):
    write(tmp_path / "a", meta((4,), "uint16", 99, {"train": 5, "test": 5}), np.arange(20).reshape(5, 4))
    with pytest.raises(UsageError, match="the data set is tokens; use flip=False"):
        pipeline.train_iterator(load_token_shards(str(tmp_path / "a")), 2, 0, flip=True)
