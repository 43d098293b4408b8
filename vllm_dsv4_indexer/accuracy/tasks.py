"""How far two servers' scores in lm-eval's tasks differ, and how certain that is.

Both answer the same samples. Each sample gives a pair of scores, and how hard it is drops out of
their difference.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

from ..errors import UserError
from .engines import SECONDS, Server

Z = 1.96  # standard deviations on each side of a normal distribution's middle 95 %
# Tokens: the server refuses a prompt that is too long for it; lm-eval would cut it, and not say so.
NO_LIMIT = 1 << 30
NOT_ASKED = -1  # RULER's score for lengths that a sample does not have


class Sample(TypedDict):
    """scores, answers: of the first server and of the second."""

    id: int
    scores: list[float]
    answers: list[list[str]]


class Scores(TypedDict):
    """Of two servers by one metric of one task. difference: the mean over the samples, first server
    less second. interval: where it lies with 95 % confidence."""

    task: str
    metric: str
    difference: float
    interval: tuple[float, float]
    samples: list[Sample]


def compare(
    model: str,
    servers: list[Server],
    names: list[str],
    context: int,
    samples: int | None,
    seed: int,
) -> list[Scores]:
    """The scores of two servers of one model in lm-eval's tasks, by task and metric.

    model: directory of the checkpoint that both serve, for its tokenizer. names: of tasks, or YAML
    files. context: tokens of RULER's contexts. samples: how many of each task, from its first on;
    None: all. seed: of the samples that a task makes itself, and of the examples in prompts.

    Left out are metrics that do not give each sample a score from 0 to 1. Raises UserError, which
    names the remedy.
    """
    random.seed(seed)
    tasks = _load(names, {"tokenizer": model, "max_seq_lengths": [context]})
    first, second = (_answers(server, model, tasks, samples, seed) for server in servers)
    comparisons = [
        comparison for task in first for comparison in _pairs(task, first[task], second[task])
    ]
    if not comparisons:
        raise UserError(
            f"--tasks: no metric of {', '.join(first)} gives each sample a score from 0 to 1"
        )
    return comparisons


def interval(differences: list[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean difference of paired scores from 0 to 1.

    Wald's interval after adding Z^2 pseudo-pairs, half of them at -1 and half at 1. Agresti and
    Coull add as many to one proportion (The American Statistician 52, 1998, 119-126). Without them,
    five pairs that agree would prove that all pairs do, as they do to scipy's intervals. Fewer are
    not enough: with half a pair at -1 and at 1, and one at 0 (Agresti and Min, Statistics in
    Medicine 24, 2005, 729-740), 13 of 100 intervals of 100 pairs miss a true loss of 2 %."""
    n = len(differences) + Z**2
    middle = sum(differences) / n
    variance = (sum(d * d for d in differences) + Z**2) / n - middle**2
    half = Z * math.sqrt(variance / n)
    return max(-1.0, middle - half), min(1.0, middle + half)


def _load(names: list[str], metadata: dict[str, Any]) -> dict[str, Any]:
    """The tasks by name. Both servers get the same ones: RULER makes new samples each time."""
    import yaml
    from lm_eval.tasks import TaskManager

    # lm-eval takes seconds to read through its own tasks.
    only_files = all(name.endswith(".yaml") for name in names)
    manager = TaskManager(metadata=metadata, include_defaults=not only_files)
    tasks: dict[str, Any] = {}
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            raise UserError(
                f"lm-eval has no task {name!r}, nor is it a YAML file: `lm-eval ls tasks` lists "
                "them"
            )
        try:
            tasks |= manager.load([name])["tasks"]
        except (OSError, yaml.YAMLError) as error:
            raise UserError(
                f"task {name} cannot be loaded ({error}). If it is its dataset: run it once where "
                "there is a network and bring $HF_HOME along, or name a YAML file that includes "
                "the task and has a dataset_path of its own"
            ) from error
    return tasks


def _answers(
    server: Server, model: str, tasks: dict[str, Any], samples: int | None, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """By task, lm-eval's account of each sample."""
    import requests
    from lm_eval import evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    api = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model=server.model,
        tokenizer=model,
        tokenizer_backend="huggingface",
        add_bos_token=True,
        max_length=NO_LIMIT,
        batch_size=Server.AT_ONCE,
        timeout=SECONDS,
    )
    for task in tasks.values():
        task.set_fewshot_seed(seed)
    try:
        done = evaluate(api, {"tasks": tasks}, limit=samples, bootstrap_iters=0)
        return dict(done["samples"])
    except requests.RequestException as error:
        words = error if error.response is None else error.response.text
        raise UserError(f"{server.url}: {words}") from error


def _pairs(
    task: str, first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> Iterator[Scores]:
    """One for each metric."""
    by_metric: dict[str, list[Sample]] = defaultdict(list)
    for a, b in zip(first, second, strict=True):
        answers = [list(chain(*sample["resps"])) for sample in (a, b)]
        for metric in a["metrics"]:
            name = metric if a["filter"] == "none" else f"{metric}, {a['filter']}"
            by_metric[name].append(
                {"id": a["doc_id"], "scores": [a[metric], b[metric]], "answers": answers}
            )
    for metric, samples in by_metric.items():
        asked = [sample for sample in samples if NOT_ASKED not in sample["scores"]]
        if asked and all(_is_score(score) for sample in asked for score in sample["scores"]):
            differences = [one - other for one, other in (sample["scores"] for sample in asked)]
            yield {
                "task": task,
                "metric": metric,
                "difference": fmean(differences),
                "interval": interval(differences),
                "samples": asked,
            }


def _is_score(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1
