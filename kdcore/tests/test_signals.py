"""Signals: collected where work can be saved, obeyed elsewhere, and never waited for beyond the grace period."""

from __future__ import annotations

import os
import signal
import time

import pytest

from kdcore.errors import Interrupted, Terminated
from kdcore.signals import Signals


def send(number):
    os.kill(os.getpid(), number)


def test_a_signal_waits_where_it_is_collected_and_ends_the_run_elsewhere():
    watch = Signals()
    with watch.handled():
        with watch.collected() as received:
            send(signal.SIGTERM)
            assert received == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_ctrl_c_ends_it_but_the_echo_of_the_first_does_not(monkeypatch):
    watch = Signals()
    with watch.collected() as received:
        send(signal.SIGINT)
        send(signal.SIGINT)  # a launcher hands on what the terminal sent already
        assert len(received) == 2
        later = time.monotonic() + 5
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_the_grace_period_ends_a_stage_that_does_not_look():
    watch = Signals(grace=0.2)
    with watch.collected():
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(5)
    error = watch.explain(KeyboardInterrupt())
    assert isinstance(error, Terminated)
    assert "not done with saving after 0.2 s" in str(error)
    time.sleep(0.3)  # the alarm is off


def test_what_ended_the_run_is_told_by_the_signal():
    watch = Signals()
    assert watch.explain(Interrupted("at step 3")).exit_code == 130
    watch.received.append(signal.SIGTERM)
    error = watch.explain(Interrupted("at step 3"))
    assert (type(error), str(error), error.exit_code) == (Terminated, "at step 3", 75)
