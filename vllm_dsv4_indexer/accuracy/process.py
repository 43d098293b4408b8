"""A function in a process of its own, which takes what it leaves behind with it; and what a process
died of."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ..errors import UserError

_LOOK_AGAIN = 0.2  # seconds until a process that says nothing is asked whether it lives


class Died(Exception):
    """The process ended without an answer; `exitcode` is as `multiprocessing.Process` has it."""

    def __init__(self, exitcode: int):
        self.exitcode = exitcode
        super().__init__(_how(exitcode))


def call(function: Callable, *arguments) -> Any:
    """`function(*arguments)`, called in a new process.

    Raises its UserErrors; RuntimeError with the words of any other exception, whose trace it has
    printed (not all of vLLM's can be sent); Died if it ended without an answer. If this process is
    interrupted, it is killed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        answer, error = _received(ours, process)
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
    if error is not None:
        raise error
    return answer


def _answer(to: Connection, function: Callable, arguments: tuple) -> None:
    answer, sent = None, None
    try:
        answer = function(*arguments)
    except UserError as error:
        sent = UserError(str(error))
    except Exception as error:
        traceback.print_exc()
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    to.send((answer, sent))


def _received(
    answers: Connection, process: multiprocessing.Process
) -> tuple[Any, Exception | None]:
    while not answers.poll(_LOOK_AGAIN) and process.is_alive():
        pass  # the end of the pipe alone tells no death: a child of the process may hold it, too
    try:
        if answers.poll():
            return answers.recv()
    except (EOFError, OSError):
        pass
    process.join()
    raise Died(process.exitcode)


def _how(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with exit status {exitcode} and without a result"
    try:
        return f"was killed by {signal.Signals(-exitcode).name}"
    except ValueError:  # one of the real-time signals, most of which have no name
        return f"was killed by signal {-exitcode}"
