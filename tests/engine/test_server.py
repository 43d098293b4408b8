"""The served API: one `vllm serve` with our backend, asked through the OpenAI client, and what its
log says at the end."""

import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import OpenAI

from vllm_dsv4_indexer import doctor

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import serve_and_chat

PROMPTS = [f"Number {number} of the questions is" for number in range(6)]


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def client(checkpoint, log, tmp_path_factory, module_monkeypatch):
    metrics = tmp_path_factory.mktemp("metrics")
    module_monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(metrics))
    with serve_and_chat.server(str(checkpoint), log=log) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def module_monkeypatch():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield monkeypatch


@pytest.fixture(scope="module")
def model(client) -> str:
    return client.models.list().data[0].id


def complete(client: OpenAI, model: str, prompt: str, **options) -> str:
    options = dict(max_tokens=16, temperature=0) | options
    return client.completions.create(model=model, prompt=prompt, **options).choices[0].text


def test_a_chat_is_answered_through_the_models_own_encoding(client, model):
    chat = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Who are you?"}],
        max_tokens=16,
        temperature=0,
        extra_body={"chat_template_kwargs": {"thinking": False}},
    )
    assert chat.choices[0].message.content
    assert chat.usage.completion_tokens == 16


def test_a_stream_brings_the_same_text_in_pieces(client, model):
    whole = complete(client, model, PROMPTS[0])
    stream = client.completions.create(
        model=model, prompt=PROMPTS[0], max_tokens=16, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole and len(pieces) > 1


def test_concurrent_requests_are_all_answered(client, model):
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda prompt: complete(client, model, prompt), PROMPTS))
    assert all(answers) and len(set(answers)) == len(PROMPTS)


def test_after_an_aborted_request_the_answers_are_as_before(client, model):
    before = [complete(client, model, prompt) for prompt in PROMPTS]
    first_piece = threading.Event()

    def abort():
        stream = client.completions.create(
            model=model, prompt="Forever", max_tokens=4000, stream=True
        )
        next(iter(stream))
        first_piece.set()
        stream.close()  # the client goes away: the server aborts the request and frees its pages

    thread = threading.Thread(target=abort)
    thread.start()
    assert first_piece.wait(60)
    thread.join()
    wait_until_idle(client)
    assert [complete(client, model, prompt) for prompt in PROMPTS] == before


def test_the_doctor_sees_on_the_servers_metrics_that_our_op_was_called(client):
    found = {one.what: one for one in doctor._server(str(client.base_url))}
    assert not any(one.problem for one in found.values()), found
    calls, tokens = map(int, re.findall(r"\d+", found["its op"].found))
    steps = 4  # the prompt, and all but the last token of the answer
    assert calls % steps == 0 and tokens % (calls // steps) == 0 and tokens > calls


def wait_until_idle(client: OpenAI) -> None:
    """Until the server runs no request any more: the aborted one would go on for minutes."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        metrics = (
            urllib.request.urlopen(str(client.base_url).replace("/v1/", "/metrics")).read().decode()
        )
        running = re.findall(r"^vllm:num_requests_running\{.*\} (.*)$", metrics, re.MULTILINE)
        if running and not any(map(float, running)):
            return
        time.sleep(0.2)
    raise AssertionError("the aborted request still runs")


def test_a_prompt_that_is_too_long_is_refused_and_the_server_goes_on(client, model):
    from openai import BadRequestError

    with pytest.raises(BadRequestError):
        complete(client, model, "word " * 9000)
    assert complete(client, model, PROMPTS[0])


def run_example(name: str, checkpoint: Path, folder: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), str(checkpoint)]
    done = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_the_example_that_serves_shows_what_the_op_did(checkpoint, tmp_path):
    out = run_example("serve_and_chat.py", checkpoint, tmp_path)
    assert re.search(r"chat +'Who are you\?' -> '.+'", out)
    assert re.search(r"completion +'Once upon a time' -> '.+'", out)
    account = json.loads(out.splitlines()[-1])
    assert min(account[what] for what in ("plans", "calls", "tokens", "entries")) > 0


def test_the_offline_example_answers_both_prompts(checkpoint, tmp_path):
    out = run_example("offline.py", checkpoint, tmp_path)
    assert len(re.findall(r"^'.+' -> '.+'$", out, re.MULTILINE)) == 2
