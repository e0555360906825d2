import threading
import time

from ar_jax.training.watchdog import Watchdog


def test_a_run_that_does_not_move_is_ended_with_a_sentence():
    said, heard = [], threading.Event()

    def leave(sentence):
        said.append(sentence)
        heard.set()

    with Watchdog(0.2, leave):
        assert heard.wait(20)
    assert len(said) == 1 and "No step has ended for 0.2 seconds" in said[0] and "from the last checkpoint" in said[0]


def test_steps_and_pauses_keep_it_quiet():
    said = []
    with Watchdog(2.0, said.append) as watchdog:
        with watchdog.paused():
            time.sleep(2.6)
        for _ in range(4):
            time.sleep(0.6)
            watchdog.moved()
    assert not said
