"""`vllm-dsv4-indexer accuracy compare --tasks`: lm-eval's scores of two servers, as pairs."""

import json
import os
import random
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean

import lm_eval
import pytest
import yaml
from scipy import stats
from tables import rows

from vllm_dsv4_indexer import cli
from vllm_dsv4_indexer.accuracy import tasks

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import serve_and_chat

LM_EVAL = Path(lm_eval.__file__).parent / "tasks"
GSM8K, NIAH = LM_EVAL / "gsm8k" / "gsm8k.yaml", LM_EVAL / "ruler" / "niah_single_1.yaml"
METRICS = ["exact_match, strict-match", "exact_match, flexible-extract"]  # of gsm8k
APPLES = [(a, b) for a in range(10, 14) for b in range(20, 23)]
PLAINLY = "The answer is {}."  # without the "####" that gsm8k's examples have before the result
SHORT = {"max_gen_toks": 32}


def write_task(path: Path, original: Path, **changes) -> Path:
    """One of lm-eval's tasks with changes, in a YAML file."""
    path.write_text(
        json.dumps({"include": str(original), "task": path.stem, **changes})
    )  # JSON is YAML, too
    return path


@pytest.fixture
def sums(tmp_path) -> Path:
    """gsm8k, with a few problems of our own in the place of its data set, and shorter answers."""
    question, answer = "Ann has {} apples and buys {}. How many has she?", "{} + {} = {}\n#### {}"
    problems = [
        {"question": question.format(a, b), "answer": answer.format(a, b, a + b, a + b)}
        for a, b in APPLES
    ]
    data = tmp_path / "sums.jsonl"
    data.write_text("\n".join(map(json.dumps, problems)))
    generation = yaml.safe_load(GSM8K.read_text())["generation_kwargs"] | SHORT
    files = {"data_files": {"train": str(data), "test": str(data)}}
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files}
    return write_task(tmp_path / "sums.yaml", GSM8K, generation_kwargs=generation, **local)


@contextmanager
def fake_server(answer: Callable[[list[int]], str], model: str = "fake") -> Iterator[str]:
    """The part of the OpenAI API that is asked for; it answers a prompt of tokens as `answer`
    says."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply({"data": [{"id": model}]})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                choices = [
                    {"index": i, "text": answer(prompt)} for i, prompt in enumerate(asked["prompt"])
                ]
                self.reply({"choices": choices})
            except ValueError as refusal:
                self.reply({"error": str(refusal)}, 400)

        def reply(self, content: dict, status: int = 200):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def compare(checkpoint: Path, folder: Path, *options: str) -> list[dict]:
    """What the command wrote about tasks alone."""
    command = ["accuracy", "compare", str(checkpoint), "--output", str(folder), "--tokens", "0"]
    assert cli.main([*command, *options]) == 0
    return json.loads((folder / "compare.json").read_text())["scores"]


def test_a_difference_is_found_by_metric_and_sample(checkpoint, sums, tmp_path, capsys):
    """Of twelve problems the second server gets one wrong, and says another's result without the
    mark before it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts = [], []

    def right(prompt: list[int]) -> str:
        prompts[0].append(prompt)
        a, b = problem(prompt)
        return f" {a} + {b} = {a + b}\n#### {a + b}"

    def worse(prompt: list[int]) -> str:
        prompts[1].append(prompt)
        a, b = problem(prompt)
        return {APPLES[3]: "#### 7", APPLES[7]: PLAINLY.format(a + b)}.get(
            (a, b), f"So\n#### {a + b}"
        )

    def problem(prompt: list[int]) -> tuple[int, int]:
        text = tokenizer.decode(prompt).split("Question:")[-1]
        return int(text.split()[2]), int(text.split()[6].strip("."))

    with fake_server(right) as first, fake_server(worse) as second:
        strict, flexible = compare(
            checkpoint, tmp_path, "--servers", first, second, "--tasks", str(sums)
        )
    assert [strict["metric"], flexible["metric"]] == METRICS
    assert [sample["scores"] for sample in strict["samples"]] == [
        [1, int(i not in (3, 7))] for i in range(12)
    ]
    assert [sample["scores"] for sample in flexible["samples"]] == [
        [1, int(i != 3)] for i in range(12)
    ]
    assert strict["samples"][7]["answers"] == [[" 12 + 21 = 33\n#### 33"], [PLAINLY.format(33)]]
    assert (strict["difference"], flexible["difference"]) == pytest.approx((2 / 12, 1 / 12))
    assert strict["interval"] == list(tasks.interval([0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]))
    _, _, row = rows(capsys.readouterr().out)
    assert row[:3] == ["sums", "exact_match, flexible-extract", "12"]
    assert row[3:6] == ["100.0 %", "91.7 %", "+8.3"]
    assert sorted(prompts[0]) == sorted(prompts[1])
    for prompt in prompts[0]:
        assert tokenizer.decode(prompt).count("Question: ") == 5 + 1


@pytest.mark.parametrize(
    "differences, low, high",
    [
        ([0, 0], -3.8416 / 5.8416, 3.8416 / 5.8416),
        # 2 / 11.8416, and variance 7.8416 / 11.8416 - 0.168896^2
        ([1, 1, 1, -1, 0, 0, 0, 0], 0.168896 - 0.453405, 0.168896 + 0.453405),
        ([0.5, -0.5], -0.699115, 0.699115),  # variance 4.3416 / 5.8416
        ([1] * 100, 0.963005 - 0.051832, 1),  # variance 1 - 0.963005^2; no difference exceeds 1
    ],
)
def test_the_interval_is_walds_of_the_pairs_and_four_pseudo_pairs(differences, low, high):
    """3.8416 = 1.96^2 pairs, to be exact."""
    assert tasks.interval(differences) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("samples", [5, 20, 100])
@pytest.mark.parametrize("better, worse", [(0, 0.02), (0, 0.1), (0, 0.3), (0.05, 0.1), (0.4, 0.3)])
@pytest.mark.parametrize("size", [1, 0.25])
def test_of_100_intervals_95_hold_the_true_difference(size, better, worse, samples, seed):
    """Of 2000: of a share `better` of the samples the first server scores `size` more, of a share
    `worse` less."""
    generator = random.Random(f"{size} {better} {worse} {samples} {seed}")
    weights = [better, worse, 1 - better - worse]
    held = 0
    for _ in range(2000):
        low, high = tasks.interval(generator.choices([size, -size, 0], weights, k=samples))
        held += low <= size * (better - worse) <= high
    assert held >= 2000 * 0.935


@pytest.mark.parametrize(
    "of_scipy",
    [
        lambda scores: stats.ttest_1samp(scores, 0).confidence_interval(0.95),
        lambda scores: (
            stats.bootstrap(
                (scores,), fmean, n_resamples=200, method="percentile", rng=0
            ).confidence_interval
        ),
    ],
    ids=["Student's", "bootstrap"],
)
@pytest.mark.filterwarnings("ignore")  # scipy's own, where all scores agree
def test_of_100_intervals_of_scipy_fewer_than_60_hold_a_rare_difference(of_scipy):
    """Why ours is used: 20 samples that agree are most likely where servers differ in one of 50,
    and an interval without width does not hold that."""
    generator = random.Random(0)
    draws = [generator.choices([-1, 0], [0.02, 0.98], k=20) for _ in range(200)]
    held = [low <= -0.02 <= high for low, high in map(of_scipy, draws)]
    ours = [low <= -0.02 <= high for low, high in map(tasks.interval, draws)]
    assert sum(held) < 120 and sum(ours) >= 190


def sample(**metrics) -> dict:
    return {
        "doc_id": 0,
        "resps": [["answer"]],
        "filter": "none",
        "metrics": list(metrics),
        **metrics,
    }


def test_rulers_scores_for_other_lengths_and_what_is_no_score_are_left_out():
    first, second = (
        [
            sample(**{"4096": score, "1024": -1.0}, loss=(-2.5, 7)),
            sample(**{"4096": -1.0, "1024": 1.0}, loss=(-3.5, 7)),
        ]
        for score in (0.5, 0.25)
    )
    rows = [
        (row["metric"], row["difference"], len(row["samples"]))
        for row in tasks._pairs("niah", first, second)
    ]
    assert rows == [("4096", 0.25, 1), ("1024", 0, 1)]


def refusal(capsys, checkpoint: Path, *options: str) -> str:
    capsys.readouterr()
    assert cli.main(["accuracy", "compare", str(checkpoint), "--tokens", "0", *options]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_tasks_need_two_servers_of_one_model(checkpoint, sums, capsys):
    def both(first: str, second: str) -> str:
        return refusal(capsys, checkpoint, "--tasks", str(sums), "--servers", first, second)

    nobody = f"http://127.0.0.1:{serve_and_chat.free_port()}"
    with fake_server(str) as one, fake_server(str, "another") as other:
        assert "--servers URL URL" in refusal(capsys, checkpoint, "--tasks", "gsm8k")
        assert "--tasks" in refusal(capsys, checkpoint, "--servers", one, other)
        assert f"{one} serves fake, {other} serves another" in both(one, other)
        assert f"{nobody} does not answer" in both(one, nobody)


def test_a_task_that_cannot_be_had_is_named(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    of_the_hub = write_task(tmp_path / "hub.yaml", GSM8K)
    with fake_server(str) as url:
        servers = ("--servers", url, url)
        assert "no task 'nothing.yaml'" in refusal(
            capsys, checkpoint, "--tasks", "nothing.yaml", *servers
        )
        line = refusal(capsys, checkpoint, "--tasks", str(of_the_hub), *servers)
        assert (
            f"task {of_the_hub} cannot be loaded" in line
            and "openai/gsm8k" in line
            and "HF_HOME" in line
        )


def test_without_lm_eval_the_remedy_is_named(checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with fake_server(str) as url:
        line = refusal(capsys, checkpoint, "--tasks", "gsm8k", "--servers", url, url)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (requirement,) = extras["lm-eval"]
    assert f"pip install '{requirement}'" in line


def test_a_server_that_refuses_is_named_with_its_words(checkpoint, sums, capsys):
    def refuse(prompt: list[int]) -> str:
        raise ValueError(f"{len(prompt)} tokens are too many")

    with fake_server(str) as good, fake_server(refuse) as bad:
        line = refusal(capsys, checkpoint, "--tasks", str(sums), "--servers", good, bad)
    assert bad in line and "tokens are too many" in line


STOCK = {"dsv4_indexer": {"impl": "stock", "projection": "engine"}}


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory) -> Iterator[list[str]]:
    """The demo checkpoint, with our compressor and with vLLM's own, started together."""
    folder = tmp_path_factory.mktemp("servers")
    options = {"ours": (), "stock": ("--additional-config", json.dumps(STOCK))}
    with ExitStack() as stack, ThreadPoolExecutor() as pool:

        def start(name: str) -> str:
            more = (*serve_and_chat.SMALL, *options[name])
            return stack.enter_context(serve_and_chat.server(str(checkpoint), more, folder / name))

        yield list(pool.map(start, options))


def test_our_compressor_and_stock_agree_in_a_few_samples_of_two_tasks(
    checkpoint, served, sums, tmp_path
):
    """The demo checkpoint babbles: it scores nothing, but both begin with the same words, until a
    toss-up parts them. RULER's prompts are of more than 2048 tokens, so that there are more entries
    than the indexer selects."""
    (tmp_path / "nltk" / "tokenizers" / "punkt_tab").mkdir(
        parents=True
    )  # RULER fetches it where it is missing
    environment = os.environ | {"NLTK_DATA": str(tmp_path / "nltk")}
    niah = write_task(
        tmp_path / "niah.yaml", NIAH, generation_kwargs={"until": [], "temperature": 0.0, **SHORT}
    )
    # In a process of its own: RULER's word list is half a GiB.
    command = [sys.executable, "-m", "vllm_dsv4_indexer.cli", "accuracy", "compare"]
    command += [str(checkpoint), "--tokens", "64", "--servers", *served]
    command += ["--tasks", f"{sums},{niah}", "--samples", "3", "--context", "2560"]
    command += ["--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "compare.json").read_text())
    agreements = result["agreement"]["two servers"]
    assert [positions for _, positions, *_ in agreements] == [63, 63, 8, 8]
    assert all(
        mean <= 0.05 and largest <= 0.5 and same >= 0.9 for *_, mean, largest, same in agreements
    )
    compared = result["scores"]
    assert [row["task"] for row in compared] == ["sums", "sums", "niah"]
    assert [row["metric"] for row in compared] == [*METRICS, "2560"]
    for row in compared:
        scores, answers = (
            [sample[what] for sample in row["samples"]] for what in ("scores", "answers")
        )
        assert len(answers) == 3
        assert sum(len(ours) > 16 and ours[:16] == stock[:16] for (ours,), (stock,) in answers) >= 2
        assert row["interval"] == list(tasks.interval([ours - stock for ours, stock in scores]))
        assert [row["task"], row["metric"], "3"] in [cells[:3] for cells in rows(done.stdout)]
