"""What vllm-ascend needs of the device to be imported and run on a machine that has none.

`torch_npu`, `acl` and `torchair` are modules whose every attribute exists: classes without
behaviour, and functions that return None. vllm-ascend's model runner is one, too: importing it asks
for more packages than the tests install. The operators that an attention layer calls on its way to
and from the indexer do nothing, and count their calls; the stock chain, which stock.py compares
with, is added there.
"""

import contextlib
import importlib.machinery
import os
import sys
import types
from collections import Counter

import torch
from torch import Tensor

ABSENT = ("torch_npu", "acl", "torchair")
# A2 or A5: vllm-ascend is built for one, and the wheel says which.
PRODUCT = os.environ["TEST_PRODUCT"]
calls: Counter[str] = Counter()  # of the operators below, by name
streams: list[str] = []  # what was launched, and which stream waited for which


class Stub(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        value = (
            type(name, (), {}) if name.strip("_")[0].isupper() else Stub(f"{self.__name__}.{name}")
        )
        setattr(self, name, value)
        return value

    def __call__(self, *args, **kwargs) -> None:
        return None


class StubFinder:
    """Finds every module below those that are absent."""

    def find_spec(self, name: str, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec) -> Stub:
        return Stub(spec.name)

    def exec_module(self, module) -> None:
        pass


class Stream:
    """Runs everything at once, as a stream may, and notes the order."""

    current: "Stream"

    def __init__(self, name: str = "beside"):
        self.name = name

    def record_event(self) -> str:
        streams.append(f"event on {self.name}")
        return f"event on {self.name}"

    def wait_event(self, event: str) -> None:
        streams.append(f"{self.name} waits for {event}")

    def wait_stream(self, other: "Stream") -> None:
        streams.append(f"{self.name} waits for {other.name}")


@contextlib.contextmanager
def on_stream(stream: Stream):
    previous, Stream.current = Stream.current, stream
    yield
    Stream.current = previous


def install() -> None:
    """Put the stubs in place, before anything imports vllm-ascend."""
    sys.meta_path.insert(0, StubFinder())
    import torch_npu
    import torch_npu._C
    import torch_npu.npu

    torch.utils.rename_privateuse1_backend("npu")  # so that torch.device("npu") is one
    torch.npu = torch_npu.npu
    torch.npu.is_available = lambda: False  # transformers asks
    torch.npu.is_current_stream_capturing = lambda: False
    Stream.current = Stream("main")
    torch.npu.Stream, torch.npu.stream, torch.npu.current_stream = (
        Stream,
        on_stream,
        lambda: Stream.current,
    )
    built_for = sys.modules["vllm_ascend._build_info"] = types.ModuleType("vllm_ascend._build_info")
    built_for.__device_type__ = PRODUCT
    sys.modules["vllm_ascend.worker.model_runner_v1"] = Stub("vllm_ascend.worker.model_runner_v1")


def counted(function):
    """The function, entered in `calls` and `streams` whenever it is called."""

    def call(*args, **kwargs):
        calls[function.__name__] += 1
        streams.append(f"{function.__name__} on {Stream.current.name}")
        return function(*args, **kwargs)

    return call


def define_operators(*operators) -> None:
    """Make functions the operators of the same names in torch.ops._C_ascend."""
    for operator in operators:
        setattr(torch.ops._C_ascend, operator.__name__, counted(operator))


def inplace_partial_rotary_mul(x: Tensor, *args, **kwargs) -> None:
    pass


def npu_sparse_attn_sharedkv_metadata(**kwargs) -> Tensor:
    return torch.zeros(1024, dtype=torch.int32)


def npu_vllm_quant_lightning_indexer_metadata(**kwargs) -> Tensor:
    return torch.zeros(1024, dtype=torch.int32)


def npu_sparse_attn_sharedkv(q: Tensor, **kwargs) -> tuple[Tensor]:
    return (torch.zeros_like(q),)


def npu_vllm_quant_lightning_indexer(query: Tensor, **kwargs) -> tuple[Tensor, None]:
    return torch.zeros(len(query), 1, 512, dtype=torch.int32), None


def npu_quant_lightning_indexer_v2_metadata(**kwargs) -> Tensor:
    return torch.zeros(1024, dtype=torch.int32)


def npu_quant_lightning_indexer_v2(query: Tensor, **kwargs) -> tuple[Tensor, None]:
    return npu_vllm_quant_lightning_indexer(query)


def npu_kv_quant_sparse_attn_sharedkv_metadata(**kwargs) -> Tensor:
    return torch.zeros(1024, dtype=torch.int32)


def npu_kv_quant_sparse_attn_sharedkv(q: Tensor, **kwargs) -> tuple[Tensor]:
    return (torch.zeros_like(q),)


def kv_compress_epilog(**kwargs) -> None:
    """The main compressor's and the sliding window's, on an A5."""


def npu_scatter_nd_update_v2(cache: Tensor, slots: Tensor, values: Tensor) -> None:
    """cache[block, offset] = value for each (block, offset) that is not negative. A cache of one
    number stands for one that is nobody's concern."""
    if slots is not None and cache.numel() > 1:
        written = slots[:, 0] >= 0  # of (-1, block size - 1), which is padding's, too
        block, offset = slots[written].long().unbind(1)
        cache[block, offset] = values[: len(slots)][written].view(-1, *cache.shape[2:])


def npu_scatter_nd_update_sk(cache: Tensor, slots: Tensor, values: Tensor) -> None:
    npu_scatter_nd_update_v2(cache, slots, values)


def compressor_metadata(cos: Tensor, sin: Tensor, *args) -> tuple[Tensor, Tensor, None]:
    """That of the main compressor: our indexer does not ask."""
    return cos[:0], sin[:0], None


def compressor_metadata_out(*args) -> None:
    """Of the stock compressors that no window is closed for."""


def compressor(x: Tensor, wkv: Tensor, *args, **kwargs) -> Tensor:
    """The main compressor: its entries are nobody's concern here."""
    return x.new_zeros(0, wkv.shape[0] // 2)


def npu_dynamic_quant(x: Tensor, dst_type: torch.dtype) -> tuple[Tensor, Tensor]:
    """int8 or fp8 with a scale for each row: its largest magnitude / 127 or 448."""
    scale = x.float().abs().amax(dim=-1) / (127 if dst_type is torch.int8 else 448)
    codes = torch.where(scale[..., None] > 0, x.float() / scale[..., None], 0)
    return (codes.round() if dst_type is torch.int8 else codes).to(dst_type), scale


def mm_with_out_dtype(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """torch_npu's aten::mm.dtype; torch has none for CPUs."""
    streams.append(f"projection on {Stream.current.name}")
    return a.to(out_dtype) @ b.to(out_dtype)


STOCK_OPERATORS = (
    inplace_partial_rotary_mul,
    npu_vllm_quant_lightning_indexer,
    npu_vllm_quant_lightning_indexer_metadata,
    npu_quant_lightning_indexer_v2,
    npu_quant_lightning_indexer_v2_metadata,
    npu_sparse_attn_sharedkv,
    npu_sparse_attn_sharedkv_metadata,
    npu_kv_quant_sparse_attn_sharedkv,
    npu_kv_quant_sparse_attn_sharedkv_metadata,
    npu_scatter_nd_update_v2,
    npu_scatter_nd_update_sk,
    kv_compress_epilog,
    compressor_metadata,
    compressor_metadata_out,
    compressor,
)
_aten = torch.library.Library("aten", "IMPL")
_vllm = torch.library.Library("vllm", "IMPL")


def define_what_a_layer_calls() -> None:
    import torch_npu

    _vllm.impl(
        "maybe_all_gather_and_maybe_unpad", lambda x, label, is_ep_comm=False: x, "CPU"
    )  # one worker
    define_operators(*STOCK_OPERATORS)
    torch_npu.npu_dynamic_quant = counted(npu_dynamic_quant)
    _aten.impl("mm.dtype", mm_with_out_dtype, "CPU")
