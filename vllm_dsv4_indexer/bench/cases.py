"""What is measured: the tokens of one call, and caches as an engine lays them out.

Values have the spread of a DeepSeek-V4 Flash layer's: hidden states uniform in +-0.05, projected
from 4096 channels by weights of standard deviation 0.0293 (kv) and 0.0512 (gate), give the normal
values below. Never zeros, which are faster.
"""

import random
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from ..batches import LAYOUTS, Spread, make_batch, view_like
from ..contract import (
    DS_MLA_ENTRY_BYTES,
    FP8_ENTRY_BYTES,
    INDEXER,
    KV_WIDTH,
    RATIO,
    ROW_WIDTH,
    Call,
    Geometry,
)
from ..read_later import first_read, read_at_hit

PAGE = 4  # tokens per state page in vLLM, with the ratio 4
_PAGE_128 = 8
PAGE_BYTES = cast(int, LAYOUTS["vllm"][0])
LAYERS = {"Flash": 21, "Pro": 30}  # those of compress_ratio 4 in the models' configurations
LENGTHS = {"one": (128, 512, 2048, 8192), "mixed": (2048,), "short": (64,), "decode": (1, 16, 256)}
_DEPTHS = {"0-64K deep": 64 << 10, "64K-128K deep": 128 << 10, "128K-256K deep": 256 << 10}
_CHUNKS = 48  # of traffic
_HIDDEN_MAX = 0.05
_WEIGHT_STDS = (0.0293, 0.0512)
_KV, _GATE = (4096**0.5 * _HIDDEN_MAX / 3**0.5 * std for std in _WEIGHT_STDS)
_FLASH = Spread(kv=_KV, gate=_GATE, ape=0.1528, norm_mean=0.685, norm=0.261)


@dataclass(frozen=True)
class Case:
    """One call: `requests` are pairs (tokens computed before, tokens of this call). Cases of one
    `name` are reported together, cases of one `kind` make a line of the plot. `hidden`: the size of
    the hidden states that the call projects first; 0 for a call that is given kv_score. `layers`:
    of how many layers it is, one after the other. `geometry`: of which compressor."""

    name: str
    kind: str
    requests: tuple[tuple[int, int], ...]
    hidden: int = 0
    layers: int = 1
    geometry: Geometry = INDEXER

    @property
    def tokens(self) -> int:
        return sum(length for _, length in self.requests)

    @property
    def entries(self) -> int:
        ratio = self.geometry.ratio
        return sum((start + length) // ratio - start // ratio for start, length in self.requests)

    @property
    def context(self) -> int:
        """The most tokens that any of the requests has behind it."""
        return max(start for start, _ in self.requests)

    @property
    def flops(self) -> int:
        """Of the projection."""
        return 2 * self.tokens * self.hidden * ROW_WIDTH

    def same_bytes(self, kv_dtype: torch.dtype) -> int:
        """What every contestant must move: kv_score in, the state rows and the entries out."""
        entry = FP8_ENTRY_BYTES if self.geometry == INDEXER else DS_MLA_ENTRY_BYTES
        rows = self.tokens * self.geometry.row_width * (kv_dtype.itemsize + 4)
        return self.layers * (rows + self.entries * entry)


def projected(case: Case, hidden: int) -> Case:
    """The same call, with the projection in front of it."""
    return replace(case, name=f"{case.name}, hidden {hidden}", hidden=hidden)


def of_compressor(case: Case, geometry: Geometry) -> Case:
    """The same call of another compressor of the model."""
    name = f"{case.name}, {geometry.head_dim}/{geometry.ratio}"
    return replace(case, name=name, geometry=geometry)


def steps() -> list[Case]:
    """Whole steps of Flash's layers: one token, sixteen requests of one, and prompts of 128 and
    2048."""
    layers = LAYERS["Flash"]
    calls = mix("decode", 1), mix("decode", 16), mix("one", 128), mix("one", 2048)
    return [
        replace(c, name=f"{c.name}, {layers} layers", kind=f"step, {c.kind}", layers=layers)
        for c in calls
    ]


def mix(kind: str, tokens: int) -> Case:
    """`tokens` tokens as one prompt's third chunk, as requests of odd starts and lengths, as
    prompts of 1 to 9 tokens, or as that many requests of one token each."""
    pick = random.Random(tokens)
    length = {
        "one": lambda: tokens,
        "mixed": lambda: pick.choice((1, 1, 1, 7, 33, 130, 515)),
        "short": lambda: pick.randrange(1, 10),
        "decode": lambda: 1,
    }[kind]
    start = {
        "one": lambda: 2 * tokens,
        "mixed": lambda: pick.randrange(10_000),
        "short": lambda: 0,
        "decode": lambda: pick.randrange(10_000),
    }[kind]
    requests, left = [], tokens
    while left:
        requests.append((start(), min(length(), left)))
        left -= requests[-1][1]
    return Case(f"{kind}, T={tokens}", kind, tuple(requests))


def traffic() -> list[Case]:
    """The chunks of a day's serving: prompts of short chats, and documents of 64K to 256K tokens in
    chunks of 2K to 8K, each as long and as deep in its document as chance has it."""
    pick = random.Random(0)
    cases = []
    for i in range(_CHUNKS):
        if i % 3 == 0:
            length = min(2000, max(16, int(pick.lognormvariate(5.3, 0.9))))
            cases.append(Case("chat", "chat", ((0, length),)))
        else:
            document, chunk = pick.randrange(64 << 10, 256 << 10), pick.choice((2048, 4096, 8192))
            start = pick.randrange(document // chunk) * chunk
            depth = next(name for name, limit in _DEPTHS.items() if start < limit)
            cases.append(Case(f"document, {depth}", "document", ((start, chunk),)))
    return sorted(cases, key=lambda case: (case.kind != "chat", case.context))


def make_layers(case: Case, kv_dtype: torch.dtype) -> list[Call]:
    """A call for each of the case's layers: the same step, weights and caches of its own. All have
    one kv_score, as an engine's layers have one buffer for it, which the projection has just
    filled."""
    first = make_call(case, kv_dtype)
    return [first, *(_with_own_layer(first) for _ in range(case.layers - 1))]


def _with_own_layer(call: Call) -> Call:
    def copied(tensor: Tensor) -> Tensor:
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()
        return view_like(tensor, storage)

    own = ("ape", "norm_weight", "inner_state_cache", "k_cache")
    return call._replace(**{name: copied(getattr(call, name)) for name in own})


def make_call(case: Case, kv_dtype: torch.dtype) -> Call:
    """A call with a K cache of the compressor's first format, in vLLM's pages."""
    end = max(start + length for start, length in case.requests)
    return make_batch(
        list(case.requests),
        geometry=case.geometry,
        page=PAGE if case.geometry.overlap else _PAGE_128,
        layout="vllm",
        kv_dtype=kv_dtype,
        norm_dtype=torch.float32,
        spread=_FLASH,
        max_pos=end,
    ).call


def with_null_pages(call: Call) -> Call:
    """The same call as state_save `readable` has it: the rows that nobody reads later lie in the
    null page."""
    request = call.token_to_req.long()
    ends = torch.zeros_like(call.inner_state_block_table[:, 0], dtype=torch.int64)
    ends = ends.scatter_reduce(0, request, call.positions + 1, "amax")
    first = torch.tensor([first_read(end, RATIO) for end in ends.tolist()])[request]
    read = (call.positions >= first) | read_at_hit(call.positions, RATIO)
    slots = torch.where(read, call.inner_state_slot_mapping, call.positions % PAGE)
    return call._replace(inner_state_slot_mapping=slots)


def make_projection(case: Case) -> tuple[Tensor, Tensor]:
    """Hidden states [T, hidden] and the weight [512, hidden] that projects them, in bfloat16."""
    numbers = torch.Generator().manual_seed(1)
    x = torch.rand(case.tokens, case.hidden, generator=numbers) * 2 * _HIDDEN_MAX - _HIDDEN_MAX
    weight = [std * torch.randn(KV_WIDTH, case.hidden, generator=numbers) for std in _WEIGHT_STDS]
    return x.bfloat16(), torch.cat(weight).bfloat16()
