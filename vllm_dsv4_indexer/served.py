"""What a running server says of itself, for `doctor --url`: asked as any client asks it."""

import json
import os
import re
import urllib.request
from http.client import HTTPException
from typing import Any

from .errors import UserError

SECONDS = 120  # for an answer: a busy server may take its time
PROMPT = "One, two, three, four. " * 8  # some dozens of tokens: more than a window
COUNTER = re.compile(r"^dsv4_indexer_(\w+)_total\{.*\} (\S+)$", re.MULTILINE)


class Server:
    """Of vLLM's, at `url`, such as http://localhost:8000. A server with an API key wants it in
    VLLM_API_KEY. All that is asked of it raises UserError where there is no answer."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")

    def version(self) -> str:
        return self._answer("/version", None, "version")

    def model(self) -> str:
        return self._answer("/v1/models", None, "data", 0, "id")

    def complete(self, model: str) -> str:
        asked = dict(model=model, prompt=PROMPT, max_tokens=4, temperature=0)
        return self._answer("/v1/completions", asked, "choices", 0, "text")

    def account(self) -> dict[str, float]:
        """Its workers' numbers together, by name (engines/metrics.py); none if it publishes
        none."""
        sums: dict[str, float] = {}
        for name, value in COUNTER.findall(self._ask("/metrics")):
            sums[name] = sums.get(name, 0) + float(value)
        return sums

    def _answer(self, path: str, body: dict[str, Any] | None, *place: str | int) -> str:
        """What is in that place of a JSON answer."""
        said = self._ask(path, body)
        try:
            value = json.loads(said)
            for key in place:
                value = value[key]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{self._url}{path} answers {said[:80]!r}: is this a server of vLLM's?"
            ) from error
        return str(value)

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        key = os.environ.get("VLLM_API_KEY")
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._url + path, data, headers)
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return str(answer.read().decode())
        except (OSError, ValueError, HTTPException) as error:  # ValueError: what is no URL
            raise UserError(
                f"{self._url}{path} does not answer: {error}. Give http://HOST:PORT, and a key, if "
                "the server wants one, in VLLM_API_KEY"
            ) from error
