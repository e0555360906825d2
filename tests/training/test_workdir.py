import json

import ml_collections
import pytest
from toy_training import make_config

from ar_jax.config import UsageError
from ar_jax.training.workdir import claim, read_config


def use(path, config):
    with claim(path, config):
        pass


def test_a_directory_remembers_its_config(tmp_path):
    use(tmp_path / "a" / "run", make_config())
    assert read_config(tmp_path / "a" / "run") == make_config()


def test_the_same_config_may_come_again_tuples_and_lists_being_one(tmp_path):
    use(tmp_path, {"data": {"shape": (8, 8)}})
    use(tmp_path, {"data": {"shape": [8, 8]}})


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", 6, "config.seed=5, not 6"),
        ("train.num_steps", 13, "config.train.num_steps=12, not 13"),
        ("optimizer.kind", "lion", "config.optimizer.kind='adamw', not 'lion'"),
        ("schedule.final_scale", 0.1, "config.schedule.final_scale=nothing, not 0.1"),
    ],
)
def test_another_config_is_refused_and_nothing_is_overwritten(tmp_path, key, value, words):
    use(tmp_path, make_config())
    before = (tmp_path / "config.json").read_bytes()
    config = make_config().to_dict()
    *sections, last = key.split(".")
    section = config[sections[0]] if sections else config
    section[last] = value
    with pytest.raises(UsageError, match=words):
        use(tmp_path, config)
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.log_every_steps", 7),
        ("train.max_skipped_steps", 7),
        ("checkpoint.keep", 7),
        ("eval.batch_size", 7),
        ("sampling.temperature", 0.5),
        ("model.mixer.across", "zigzag"),
    ],
)
def test_what_cannot_change_the_result_may_differ(tmp_path, key, value):
    use(tmp_path, make_config())
    config = make_config().to_dict()
    *sections, last = key.split(".")
    section = config
    for name in sections:
        section = section.setdefault(name, {})
    section[last] = value
    use(tmp_path, config)
    assert read_config(tmp_path).to_dict() == config


def test_a_second_user_is_refused_until_the_first_is_done(tmp_path):
    with claim(tmp_path, make_config()), pytest.raises(UsageError, match="in use by another process; wait"):
        use(tmp_path, make_config())
    use(tmp_path, make_config())


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match="Cannot write to"):
            use(path, make_config())
    assert (tmp_path / "file").read_text() == "mine"


def test_a_config_that_is_missing_or_unreadable_is_told(tmp_path):
    with pytest.raises(UsageError, match="config.json does not exist; give the --workdir"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UsageError, match="config.json cannot be read"):
        use(tmp_path, make_config())
    assert (tmp_path / "config.json").read_text() == '{"seed": '


def test_values_that_are_not_plain_are_refused(tmp_path):
    with pytest.raises(UsageError, match="plain values only"):
        use(tmp_path, ml_collections.ConfigDict({"seed": object()}))


def test_the_config_is_readable_json(tmp_path):
    use(tmp_path, make_config())
    assert json.loads((tmp_path / "config.json").read_text())["train"]["num_steps"] == 12
