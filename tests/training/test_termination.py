import os
import signal
import threading

from ar_jax.training.termination import EXIT_CODE, Termination


def test_sigterm_is_noted_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with Termination() as termination:
        assert not termination.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.requested
    assert signal.getsignal(signal.SIGTERM) is before and EXIT_CODE == 143


def test_sigterm_breaks_off_only_what_may_be_broken_off():
    reached = []
    with Termination() as termination:
        with termination.interrupts():
            reached.append("inside")
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("never")
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("after")
    assert reached == ["inside", "after"] and termination.requested


def test_in_another_thread_it_leaves_signals_alone():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work():
        with Termination() as termination:
            found.append((signal.getsignal(signal.SIGTERM), termination.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(before, False)]
