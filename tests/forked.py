"""Runs Python in a process of its own that has the large packages already.

To import torch and vLLM takes ten seconds of a core, and the tests start a hundred such processes.
So one process imports them, does nothing else (`serve`), and is forked for each run.

vLLM has found our plugin by then, as it does when it is imported. OpenMP and vLLM's log have read
their environment: a run has the threads that its pytest has. What is asked of the imports
themselves, or of the start of a process, wants a fresh interpreter.
"""

import gc
import importlib
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

SECONDS = 1800  # of a run: it is killed then
# What an engine on a CPU imports, but for what is ours.
VLLM = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.warmup.kernel_warmup",
    "vllm.models.deepseek_v4.cpu.model",
)
# Most of what vLLM imports, without itself: it will look for our plugin in the run.
BELOW_VLLM = ("torch._inductor.lowering", "transformers.models.auto.image_processing_auto")


def python(
    *arguments: str,
    environment: dict[str, str] | None = None,
    log: Path | None = None,
    imported: tuple[str, ...] = VLLM,
) -> subprocess.CompletedProcess:
    """Runs `python ARGUMENTS`: a script, -m MODULE or -c CODE, and its arguments. `environment`
    comes on top of ours. `imported`: what it has already.

    Returns its exit status and what it printed; all of that is in `stdout`, and in the file `log`
    too, where that is given."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (log, log) if log else (Path(folder, name) for name in ("out", "err"))
        job = dict(arguments=arguments, environment=os.environ | (environment or {}))
        job |= dict(folder=os.getcwd(), streams=[os.devnull, str(out), str(err)])
        server = _server(imported)
        print(json.dumps(job), file=server.stdin, flush=True)
        status = server.stdout.readline()
        assert status, f"{server.args} has ended: see its error"
        printed = (out.read_text(), "" if log else err.read_text())
        return subprocess.CompletedProcess(arguments, int(status), *printed)


@cache
def _server(imported: tuple[str, ...]) -> subprocess.Popen:
    """It ends when this process does, and with it the pipe."""
    command = [sys.executable, __file__, *imported]
    # An eager engine would still compile a part of vLLM's sampler, for seconds. Workers that vLLM
    # spawns have the environment of the run, and compile.
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "1"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def serve(imported: list[str]) -> None:
    for name in imported:
        importlib.import_module(name)
    gc.freeze()  # the garbage collector of a run need not look at all that
    gc.unfreeze = lambda: None  # as vLLM makes it do when an engine ends
    for job in sys.stdin:
        if not (run := os.fork()):
            return become(**json.loads(job))
        _, status = os.waitpid(run, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def become(
    arguments: list[str], environment: dict[str, str], folder: str, streams: list[str]
) -> None:
    signal.alarm(SECONDS)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    logging.getLogger("vllm").setLevel(environment.get("VLLM_LOGGING_LEVEL", "INFO"))
    for number, file in enumerate(streams):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    what, *rest = arguments
    sys.argv, sys.path[0] = arguments, folder
    if what == "-c":
        code, *sys.argv[1:] = rest
        exec(code, {"__name__": "__main__"})
    elif what == "-m":
        module, *sys.argv[1:] = rest
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(what).parent)
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1:])
