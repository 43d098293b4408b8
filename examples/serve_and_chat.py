"""Serves a model with the dsv4_indexer backend, asks it two things, and stops it.

    python examples/serve_and_chat.py MODEL

The server's output goes to serve_and_chat.log. The last line shows what our op did: the worker's
account, from the file that the setting `account` names.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

LOG = Path("serve_and_chat.log")
START_SECONDS = 300
STOP_SECONDS = 60


def main(model: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        account = Path(folder) / "account.jsonl"
        settings = json.dumps({"dsv4_indexer": {"account": str(account)}})
        talk(model, (*SMALL, "--additional-config", settings))
        accounts = account.read_text().splitlines() if account.exists() else []
    if not accounts:
        sys.exit(f"the server's worker gave no account of what the op did: see {LOG}")
    say("the worker's account of what the op did:")
    print(accounts[-1])


def talk(model: str, options: tuple[str, ...]) -> None:
    with server(model, options) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        served = client.models.list().data[0].id
        question = "Who are you?"
        chat = client.chat.completions.create(
            model=served,
            messages=[{"role": "user", "content": question}],
            max_tokens=24,
            temperature=0,
            extra_body={"chat_template_kwargs": {"thinking": False}},
        )
        say(f"chat        {question!r} -> {chat.choices[0].message.content!r}")
        prompt = "Once upon a time"
        completion = client.completions.create(
            model=served, prompt=prompt, max_tokens=24, temperature=0
        )
        say(f"completion  {prompt!r} -> {completion.choices[0].text!r}")


SMALL = ("--max-model-len", "8192", "--kv-cache-memory-bytes", "1G")


@contextmanager
def server(model: str, options: tuple[str, ...] = SMALL, log: Path = LOG) -> Iterator[str]:
    """Runs `vllm serve` on a free port and gives its URL once it answers. It is always stopped."""
    port = free_port()
    command = ["vllm", "serve", model, "--attention-backend", "dsv4_indexer", "--port", str(port)]
    command += options
    # Time for the worker to give its account before vLLM kills it.
    command += ["--shutdown-timeout", "10"]
    say(" ".join(command))
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_up(process, url := f"http://127.0.0.1:{port}", log)
        yield url
    finally:
        say("stopping the server")
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the workers too


def wait_until_up(process: subprocess.Popen, url: str, log: Path) -> None:
    begin = time.monotonic()
    deadline, next_word = begin + START_SECONDS, begin + 10
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(
                f"the server stopped with status {process.returncode}:\n{log.read_text()[-2000:]}"
            )
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return say("the server is up")
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        if time.monotonic() > next_word:
            say("waiting for the server to load the model")
            next_word += 10
    sys.exit(f"the server did not answer within {START_SECONDS} s: see {log}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


START = time.monotonic()


def say(message: str) -> None:
    print(f"[{time.monotonic() - START:5.1f} s] {message}", flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("interrupted; the server is stopped")
