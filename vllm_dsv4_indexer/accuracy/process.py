"""Calls a function in a process of its own, so that nothing is left of it; says what a process died
of."""

import json
import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from ..errors import UserError

T = TypeVar("T")

_LOOK_AGAIN = 0.2  # seconds between two looks at whether a silent process is alive


class Died(Exception):
    """The process ended without an answer. `exitcode` is that of `multiprocessing.Process`."""

    def __init__(self, exitcode: int):
        self.exitcode = exitcode
        super().__init__(_how(exitcode))


def with_settings(measure: Callable[..., T], settings: dict[str, Any], *arguments: Any) -> T:
    """Calls `measure(settings, *arguments)`, which starts an engine with these settings, in a
    process of its own. Raises what `call` does, but UserError where the process died."""
    words = f"the engine with the settings {json.dumps(settings)}"
    try:
        return call(measure, settings, *arguments)
    except Died as death:
        why = f"{words} {death}"
        if death.exitcode == -signal.SIGKILL:
            why += (
                ". The system sends that signal when memory runs out (see `dmesg`). Try fewer "
                "tokens: `accuracy compare` takes about 1.4 MiB for each"
            )
        raise UserError(why) from None
    except Exception as error:
        error.add_note(words)
        raise


def call(function: Callable[..., T], *arguments: Any) -> T:
    """Calls `function(*arguments)` in a new process and returns its result.

    Raises its UserErrors; RuntimeError with the message of any other exception, whose traceback the
    process has printed (not all of vLLM's exceptions can be pickled); Died if the process ended
    without an answer. If this process is interrupted, the new one is killed.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        answer: T
        answer, error = _received(ours, process)
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
    if error is not None:
        raise error
    return answer


def _answer(to: Connection, function: Callable[..., T], arguments: tuple[Any, ...]) -> None:
    answer: T | None = None
    sent: Exception | None = None
    try:
        answer = function(*arguments)
    except UserError as error:
        sent = UserError(str(error))
    except Exception as error:
        traceback.print_exc()
        sent = RuntimeError(f"{type(error).__name__}: {error}")
    to.send((answer, sent))


def _received(answers: Connection, process: SpawnProcess) -> tuple[Any, Exception | None]:
    while not answers.poll(_LOOK_AGAIN) and process.is_alive():
        pass  # an open pipe does not mean that it lives: a child of the process may hold it, too
    try:
        if answers.poll():
            answer, error = answers.recv()
            return answer, error
    except (EOFError, OSError):
        pass
    process.join()
    raise Died(process.exitcode or 0)


def _how(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with exit status {exitcode} and without a result"
    try:
        return f"was killed by {signal.Signals(-exitcode).name}"
    except ValueError:  # one of the real-time signals, most of which have no name
        return f"was killed by signal {-exitcode}"
