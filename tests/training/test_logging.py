import io
import json

import numpy as np
import pytest
import rich.console
from tensorboardX.proto import event_pb2

from ar_jax.training.logging import Bar, Lines, Recorder, drop_lines_after, make_progress


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def board_tags(directory):
    """(tag, step) of all TensorBoard entries: records are length (8 bytes), checksum (4), message, checksum (4)."""
    found = []
    for file in directory.glob("events*"):
        content, place = file.read_bytes(), 0
        while place < len(content):
            length = int.from_bytes(content[place : place + 8], "little")
            event = event_pb2.Event.FromString(content[place + 12 : place + 12 + length])
            found += [(value.tag, event.step) for value in event.summary.value]
            place += length + 16
    return found


def test_metrics_go_to_the_file_to_tensorboard_and_to_the_reader(tmp_path, capsys):
    recorder = Recorder(tmp_path, 0, 10, {"examples": 4, "flops": 3e9}, peak_flops=1e12, progress=Lines(0, 10))
    recorder.metrics(5, {"loss": 1.5, "learning_rate": 0.1})
    recorder.metrics(10, {"loss": float("nan")})
    recorder.image(10, np.zeros((4, 4, 3), np.uint8))
    recorder.close()
    first, second = lines(tmp_path / "metrics.jsonl")
    assert (first["step"], first["loss"], first["learning_rate"]) == (5, 1.5, 0.1) and first["examples_per_second"] > 0
    assert second["loss"] is None  # JSON has no NaN
    assert first["seconds_per_step"] == pytest.approx(4 / first["examples_per_second"])
    assert first["mfu"] == pytest.approx(3e9 / first["seconds_per_step"] / 1e12)
    tags = board_tags(tmp_path / "tensorboard")
    assert {("loss", 5), ("loss", 10), ("learning_rate", 5), ("samples", 10)} <= set(tags)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("step 5/10  loss 1.5000") and "examples/s  ETA 0:00:0" in out[0]


def test_a_resumed_run_drops_later_and_half_written_lines(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    drop_lines_after(file, 2)
    assert lines(file) == [{"step": 1}, {"step": 2}]
    drop_lines_after(tmp_path / "missing.jsonl", 2)


@pytest.mark.parametrize(("terminal", "kind"), [(True, Bar), (False, Lines)])
def test_a_terminal_gets_a_bar_and_everything_else_gets_lines(terminal, kind):
    console = rich.console.Console(file=io.StringIO(), force_terminal=terminal, width=120)
    progress = make_progress(0, 10, console)
    assert isinstance(progress, kind)
    progress.update(5, 1.25, 100.0)
    progress.close()
    shown = console.file.getvalue()
    assert not terminal or all(words in shown for words in ("5/10", "loss 1.2500", "100 examples/s", "ETA"))
