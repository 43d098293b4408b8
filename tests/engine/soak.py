"""A server with too small a KV cache under random traffic, for minutes: `make soak`.

    python tests/engine/soak.py MODEL [--minutes 5] [--seed N]

Clients come in bursts and share prefixes. Some go away in the middle, some are killed, and some
send what is no request. Whoever waits must get the answer that the question gets alone. Then the
worker is killed, and a server that is started again must answer the same. The worker's memory is
reported.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression

import aiohttp
import psutil
from engine import SHAPE_TOLERANCE, largest_difference, run_engine
from traffic import Question, Visit, make_questions, make_visits

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import serve_and_chat

TICK = 0.05  # seconds
QUESTIONS, LONGEST, CONTEXT, STEP = 30, 1800, 2048, 512  # all but the first in tokens
CLIENTS = 24  # at most, at a time
NONSENSICAL, KILLED = 0.03, 0.006  # of the clients
SERVER = (
    *("--max-model-len", str(CONTEXT), "--max-num-batched-tokens", str(STEP)),
    *("--kv-cache-memory-bytes", "9M", "--no-scheduler-reserve-full-isl"),
)
OURS = re.compile(r"^.*(?:WARNING|ERROR|CRITICAL).*dsv4_indexer.*$", re.M | re.I)

# What the server must refuse, and how.
NONSENSE = {
    "no JSON": (b'{"prompt": [1, 2', 400),
    "a prompt that is too long": (dict(prompt=[1] * (CONTEXT + 1)), 400),
    "a negative number of tokens": (dict(prompt=[1], max_tokens=-1), 400),
    "a token that does not exist": (dict(prompt=[1 << 30], max_tokens=1), 400),
    "an unknown model": (dict(prompt=[1], model="none"), 404),
}
CLIENT = """
import sys, urllib.request
headers = {"Content-Type": "application/json"}
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), headers)
for line in urllib.request.urlopen(request):
    print(line, flush=True)
"""


@dataclass
class Soak:
    """What is asked of a server, and what came of it. expected: by question."""

    url: str
    questions: list[Question]
    expected: list[dict]
    seed: int = 0
    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # minutes, MiB

    async def run(self, minutes: float) -> None:
        self.begin, self.worker = time.monotonic(), worker()
        draw, seats = random.Random(f"soak {self.seed}"), asyncio.Semaphore(CLIENTS)
        async with aiohttp.ClientSession() as self.session:
            watching = asyncio.create_task(self.watch())
            async with asyncio.TaskGroup() as clients:
                for visit in make_visits(self.seed, len(self.questions)):
                    await asyncio.sleep(self.begin + TICK * visit.comes - time.monotonic())
                    await seats.acquire()
                    if self.minutes() > minutes:
                        break
                    client = self.client(visit, draw.random(), draw.random())
                    clients.create_task(client).add_done_callback(lambda _: seats.release())
            watching.cancel()
            await self.count_in_server()

    async def ask_each(self) -> None:
        async with aiohttp.ClientSession() as self.session:
            for question in range(len(self.questions)):
                await self.ask(Visit(question, 0, None))

    def minutes(self) -> float:
        return (time.monotonic() - self.begin) / 60

    async def client(self, visit: Visit, kind: float, which: float) -> None:
        if kind < NONSENSICAL:
            await self.talk_nonsense([*NONSENSE][int(which * len(NONSENSE))])
        elif kind < NONSENSICAL + KILLED:
            await self.be_killed(self.questions[visit.question])
        else:
            await self.ask(visit)

    async def ask(self, visit: Visit) -> None:
        asked = self.request(self.questions[visit.question])
        patience = None if visit.leaves is None else TICK * (visit.leaves - visit.comes)
        try:
            status, said = await asyncio.wait_for(self.post(asked), patience)
        except TimeoutError:
            self.counts["left"] += 1  # and closed the connection
            if patience is None:
                self.faults.append(f"question {visit.question}: no answer")
            return
        self.counts["answered"] += 1
        if status != 200:
            self.faults.append(f"question {visit.question}: {status}: {said}")
        elif said := self.otherwise(visit.question, answer(said)):
            self.faults.append(f"question {visit.question}: {said}")

    def otherwise(self, question: int, said: dict) -> str:
        try:
            difference = largest_difference(said, self.expected[question])
        except AssertionError as error:
            return str(error)
        return f"differs by {difference}" if difference > SHAPE_TOLERANCE else ""

    async def talk_nonsense(self, what: str) -> None:
        asked, expected = NONSENSE[what]
        status, said = await self.post(asked)
        self.counts["refused"] += 1
        if status != expected:
            self.faults.append(f"{what}: {status} instead of {expected}: {said}")

    async def be_killed(self, question: Question) -> None:
        """After the first word of the answer, by a signal that a process cannot see."""
        asked = json.dumps(self.request(question) | dict(stream=True))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CLIENT, self.completions, asked), stdout=asyncio.subprocess.PIPE
        )
        await process.stdout.readline()
        process.kill()
        await process.wait()
        self.counts["killed"] += 1

    @property
    def completions(self) -> str:
        return f"{self.url}/v1/completions"

    def request(self, question: Question) -> dict:
        asked = question.sampling | dict(prompt=question.prompt)
        return asked | dict(return_token_ids=True, return_tokens_as_token_ids=True)

    async def post(self, asked: dict | bytes) -> tuple[int, dict]:
        data = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
        headers = {"Content-Type": "application/json"}
        async with self.session.post(self.completions, data=data, headers=headers) as response:
            return response.status, await response.json()

    async def count_in_server(self) -> None:
        async with self.session.get(f"{self.url}/metrics") as response:
            metrics = await response.text()
        for name in ("num_preemptions", "prefix_cache_hits"):
            (value,) = re.findall(rf"^vllm:{name}_total\{{.*\}} (.*)$", metrics, re.M)
            self.counts[name] = int(float(value))

    async def watch(self) -> None:
        while True:
            minutes, mib = self.minutes(), self.worker.memory_info().rss / 2**20
            self.memory.append((minutes, mib))
            print(f"{minutes:5.1f} min  worker {mib:5.0f} MiB  {dict(self.counts)}", flush=True)
            await asyncio.sleep(15)

    def growth(self) -> float:
        """MiB a minute, in the second half."""
        half = self.memory[len(self.memory) // 2 :]
        return linear_regression(*zip(*half)).slope if len(half) > 1 else float("nan")


def answer(said: dict) -> dict:
    """In the form of run_engine.py."""
    (choice,) = said["choices"]
    positions = choice["logprobs"]["top_logprobs"]
    logprobs = [{name.removeprefix("token_id:"): p for name, p in one.items()} for one in positions]
    return dict(tokens=choice["token_ids"], logprobs=logprobs)


def worker() -> psutil.Process:
    """The one of the server's processes that has the model."""
    processes = psutil.Process().children(recursive=True)
    return max(processes, key=lambda process: process.memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=random.randrange(1000))
    asked = parser.parse_args()
    print(f"seed {asked.seed}")
    questions = make_questions(asked.seed, QUESTIONS, LONGEST)
    with tempfile.TemporaryDirectory() as folder:
        expected = lone_answers(Path(folder), asked.model, questions)
        first, second = Path(folder) / "first", Path(folder) / "second"
        with serve_and_chat.server(str(asked.model), SERVER, first) as url:
            soak = Soak(url, questions, expected, asked.seed)
            asyncio.run(soak.run(asked.minutes))
            soak.faults += OURS.findall(first.read_text())
            kill_worker()
        with serve_and_chat.server(str(asked.model), SERVER, second) as url:
            again = Soak(url, questions, expected)
            asyncio.run(again.ask_each())
    report(soak, again)


def lone_answers(folder: Path, model: Path, questions: list[Question]) -> list[dict]:
    rounds = [dict(prompts=[one.prompt], sampling=one.sampling) for one in questions]
    options = dict(max_model_len=CONTEXT, max_num_batched_tokens=STEP, enable_prefix_caching=False)
    return [answers[0] for answers in run_engine(folder, model, rounds, **options).rounds]


def kill_worker() -> None:
    """And see that its server does not go on without it."""
    processes = psutil.Process().children(recursive=True)
    worker().kill()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, f"without its worker the server goes on: {alive}"


def report(soak: Soak, again: Soak) -> None:
    faults = soak.faults + again.faults
    print(f"all of it: {dict(soak.counts)}; by the second server: {dict(again.counts)}")
    print(f"the worker grew by {soak.growth():.1f} MiB a minute in the second half")
    print(*faults[:20], sep="\n")
    sys.exit(f"{len(faults)} faults; again: make soak ARGS='--seed {soak.seed}'" if faults else 0)


if __name__ == "__main__":
    main()
