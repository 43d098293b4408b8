"""Who answers: vLLM in this process or a server (needles and log-probabilities), or transformers
(needles)."""

import http.client
import json
import os
import traceback
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypedDict

from ..errors import UserError
from ..packages import need
from ..settings import NAMESPACE
from .document import Document, Needle

SECONDS = 3600  # that a server may take for one request
Logprobs = list[dict[int, float]]  # by position, of the tokens that the engine names


class Found(TypedDict):
    """For each needle, whether the model says its value, asked for by its key and by its distance
    from the question."""

    key: list[bool]
    distance: list[bool]


class Finder(Protocol):
    def found(self, document: Document) -> Found: ...


@contextmanager
def _starting(how: str) -> Iterator[None]:
    """What a library says against a model or its settings is for the user, so it is raised as a
    UserError. It may be a bug, too, so its traceback is printed."""
    try:
        yield
    except (OSError, ValueError) as error:
        traceback.print_exc()
        raise UserError(f"{how}: {error}") from None


class Engine(ABC):
    """Takes prompts of tokens, and has a prefix cache."""

    @abstractmethod
    def answers(self, prompts: list[list[int]]) -> list[int]:
        """The most likely token after each prompt."""

    @abstractmethod
    def prompt_logprobs(self, prompts: list[list[int]]) -> list[Logprobs]:
        """By prompt, for each token but the first, the log-probabilities of it and of the most
        likely one."""

    @abstractmethod
    def decode(self, prompt: list[int], tokens: int) -> tuple[list[int], Logprobs]:
        """The most likely continuation of `tokens` tokens, and their log-probabilities."""

    def found(self, document: Document) -> Found:
        self.answers([document.tokens])  # from now on it comes from the prefix cache
        return self.ask([(document, needle) for needle in document.needles])

    def ask(self, needles: list[tuple[Document, Needle]]) -> Found:
        prompts = [document.ask_by_key(needle) for document, needle in needles]
        prompts += [document.ask_by_distance(needle) for document, needle in needles]
        answers = zip(self.answers(prompts), 2 * needles, strict=True)
        hits = [answer == needle.value for answer, (_, needle) in answers]
        return {"key": hits[: len(needles)], "distance": hits[len(needles) :]}


class Server(Engine):
    """`vllm serve`, by its OpenAI API, which also takes and returns tokens."""

    AT_ONCE = 16  # prompts in a request

    def __init__(self, url: str):
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"{url!r} is no URL of a server: write http://HOST:PORT")
        try:
            self.model: str = self._json("/v1/models")["data"][0]["id"]
        except (TypeError, LookupError):
            raise UserError(f"{self.url} does not name its model as `vllm serve` does") from None

    def answers(self, prompts: list[list[int]]) -> list[int]:
        asked = {"return_token_ids": True, "max_tokens": 1}
        batches = [
            prompts[start : start + self.AT_ONCE] for start in range(0, len(prompts), self.AT_ONCE)
        ]
        return [
            choice["token_ids"][0] for batch in batches for choice in self._complete(batch, **asked)
        ]

    def prompt_logprobs(self, prompts: list[list[int]]) -> list[Logprobs]:
        choices = self._complete(prompts, max_tokens=1, prompt_logprobs=1)
        return [
            [
                {int(token): entry["logprob"] for token, entry in position.items()}
                for position in choice["prompt_logprobs"][1:]
            ]
            for choice in choices
        ]

    def decode(self, prompt: list[int], tokens: int) -> tuple[list[int], Logprobs]:
        asked = {"max_tokens": tokens, "ignore_eos": True, "logprobs": 1}
        (said,) = self._complete(
            [prompt], **asked, return_token_ids=True, return_tokens_as_token_ids=True
        )
        return said["token_ids"], [
            {int(name.removeprefix("token_id:")): value for name, value in position.items()}
            for position in said["logprobs"]["top_logprobs"]
        ]

    def _complete(self, prompts: list[list[int]], **asked: Any) -> list[dict[str, Any]]:
        """The answers to these prompts, sent in one request."""
        asked |= {"model": self.model, "prompt": prompts, "temperature": 0}
        choices = self._json("/v1/completions", asked)["choices"]
        return sorted(choices, key=lambda choice: int(choice["index"]))

    def _json(self, path: str, asked: dict[str, Any] | None = None) -> Any:
        data = None if asked is None else json.dumps(asked).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as refusal:
            words = refusal.read(500).decode(errors="replace")
            raise UserError(f"{self.url}: {refusal}: {words}") from None
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no JSON
            raise UserError(f"{self.url} does not answer as `vllm serve` does: {error}") from None


@contextmanager
def _environment() -> Iterator[None]:
    """An engine that starts in this context runs in this process, and its log does not drown our
    tables. Afterwards the environment is as before, for other processes that this one starts."""
    ours = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    before = dict(os.environ)
    os.environ.update(ours | {"VLLM_LOGGING_LEVEL": before.get("VLLM_LOGGING_LEVEL", "ERROR")})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name)
        os.environ.update({name: before[name] for name in ours if name in before})


class VllmEngine(Engine):
    """An engine in this process, with our backend."""

    def __init__(
        self, model: str, settings: dict[str, Any], longest: int, chunk: int, abreast: int = 1
    ):
        """settings: of our backend. longest: tokens of the longest document. chunk: tokens of a
        prompt that a step computes. abreast: how many prompts it computes at a time."""
        options: dict[str, Any] = dict(
            attention_backend="dsv4_indexer",
            additional_config={NAMESPACE: settings},
            max_model_len=longest + 2,  # with a question and its answer
            max_num_batched_tokens=max(abreast * chunk, 512),
            kv_cache_memory_bytes=1 << 30,
            enforce_eager=True,
            skip_tokenizer_init=True,  # prompts are of tokens
        )
        with _environment():
            need("vllm", "an engine in this process")
            from vllm import LLM

            with _starting(f"with the settings {json.dumps(settings)}"):
                self.llm = LLM(model, **options)
        self.set_chunk(chunk, abreast)

    def answers(self, prompts: list[list[int]]) -> list[int]:
        return [output.outputs[0].token_ids[0] for output in self._generate(prompts, max_tokens=1)]

    def set_chunk(self, chunk: int, abreast: int = 1) -> None:
        """Changes both, to at most as many tokens a step as the engine was made for."""
        client: Any = self.llm.llm_engine.engine_core  # the one of an engine in this process
        scheduler = client.engine_core.scheduler
        # vLLM looks at the first if there are several prompts.
        scheduler.scheduler_config.long_prefill_token_threshold = chunk
        scheduler.max_num_scheduled_tokens = abreast * chunk

    def prompt_logprobs(self, prompts: list[list[int]]) -> list[Logprobs]:
        outputs = self._generate(prompts, max_tokens=1, prompt_logprobs=1)
        return [
            [_values(position) for position in output.prompt_logprobs[1:]] for output in outputs
        ]

    def decode(self, prompt: list[int], tokens: int) -> tuple[list[int], Logprobs]:
        (output,) = self._generate([prompt], max_tokens=tokens, logprobs=1, ignore_eos=True)
        (said,) = output.outputs
        return list(said.token_ids), [_values(position) for position in said.logprobs]

    def _generate(self, prompts: list[list[int]], **sampling: Any) -> list[Any]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        requests = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        return self.llm.generate(
            requests, SamplingParams(temperature=0, **sampling), use_tqdm=False
        )

    def indexed_layers(self) -> dict[int, Any]:
        """The attention modules that have an indexer, by the number of their layer."""
        executor: Any = self.llm.llm_engine.model_executor
        model = executor.driver_worker.worker.get_model()
        attention = {
            name.split(".")[-2]: module
            for name, module in model.named_modules()
            if name.endswith(".attn")
        }
        return {
            int(number): module
            for number, module in attention.items()
            if module.indexer is not None
        }


def _values(position: dict[int, Any]) -> dict[int, float]:
    return {token: entry.logprob for token, entry in position.items()}


class Transformers:
    """transformers' implementation in fp32. It computes a document and all its questions at once,
    which its memory allows up to about 4K tokens."""

    def __init__(self, model: str):
        need("transformers", "--transformers")
        import torch
        from transformers import DeepseekV4ForCausalLM

        with _starting("in transformers"):
            self.model: Any = DeepseekV4ForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model.eval()

    def found(self, document: Document) -> Found:
        import torch

        questions = document.all_questions()
        with torch.inference_mode():
            tokens = torch.tensor([[*document.tokens, *questions]])
            answers = (
                self.model(tokens, use_cache=False, logits_to_keep=len(questions))
                .logits[0]
                .argmax(dim=-1)
            )
        values = torch.tensor([needle.value for needle in document.needles])
        distance, key = ((answers[i::4] == values).tolist() for i in (0, 1))
        return {"key": key, "distance": distance}
