"""A function in a process of its own: its result, its errors, and what it died of."""

import os
import signal
import subprocess
import sys
import time

import pytest

from vllm_dsv4_indexer.accuracy import process
from vllm_dsv4_indexer.errors import UserError


def add(one: int, other: int) -> int:
    return one + other


def refuse() -> None:
    raise UserError("choose another")


def fail() -> None:
    raise KeyError("lost")


def die(how: int) -> None:
    os.kill(os.getpid(), how)


def die_beside_a_child() -> None:
    """The child holds the end of the pipe on which the result would come."""
    if os.fork():
        die(signal.SIGKILL)
    time.sleep(60)


def test_the_result_comes_back():
    assert process.call(add, 1, 2) == 3


def test_an_error_for_the_user_comes_back_as_such():
    with pytest.raises(UserError, match="^choose another$"):
        process.call(refuse)


def test_of_any_other_error_the_words_come_back_and_the_trace_is_printed(capfd):
    with pytest.raises(RuntimeError, match="^KeyError: 'lost'$"):
        process.call(fail)
    assert 'raise KeyError("lost")' in capfd.readouterr().err


@pytest.mark.parametrize(
    "function, argument, how",
    [
        (die, signal.SIGKILL, "was killed by SIGKILL"),
        (die, signal.SIGSEGV, "was killed by SIGSEGV"),
        (os._exit, 3, "ended with exit status 3 and without a result"),
        (os._exit, 0, "ended with exit status 0 and without a result"),
    ],
)
def test_a_process_that_ends_without_a_result_says_how(function, argument, how):
    with pytest.raises(process.Died, match=how):
        process.call(function, int(argument))


def test_a_death_is_noticed_beside_a_child_that_lives_on():
    start = time.monotonic()
    with pytest.raises(process.Died, match="SIGKILL"):
        process.call(die_beside_a_child)
    assert time.monotonic() - start < 50


INTERRUPTED = """
import os, signal, sys, threading, time
from vllm_dsv4_indexer.accuracy import process

if __name__ == "__main__":
    threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()
    process.call(time.sleep, 120)
"""


def test_ctrl_c_ends_the_process_too(tmp_path):
    """Else it would hold the pipes, and be waited for."""
    script = tmp_path / "script.py"
    script.write_text(INTERRUPTED)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert "KeyboardInterrupt" in done.stderr
