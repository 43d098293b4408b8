"""The op as torch and Python see it."""

import os
import subprocess
import sys

import pytest
import torch

from batches import IMPLS_WHERE_ROWS_ARE_UNIQUE, assert_identical, make_batch
from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.ops import cpu

OP = torch.ops.dsv4_indexer.compress.default


@pytest.mark.parametrize(
    "impl, k_format",
    [(i, f) for i in IMPLS_WHERE_ROWS_ARE_UNIQUE for f in ("fp8_pow2", "int8_hadamard")] + [("reference", "fp8_amax")],
)
def test_opcheck_passes(impl, k_format):
    batch = make_batch([(5, 9)], k_format=k_format)
    torch.library.opcheck(OP, batch.call, {"k_format": k_format, "impl": impl})


def test_torch_compile_sees_the_mutation():
    batch = make_batch([(5, 9)])
    expected = batch.clone().run()

    def doubled(*tensors):
        ops.compress(*tensors)
        return tensors[8] * 2

    result = torch.compile(doubled, backend="aot_eager", fullgraph=True)(*batch.call)
    assert_identical(batch, expected)
    assert torch.equal(result.view(torch.int32), (expected.inner_state_cache * 2).view(torch.int32))


def test_the_default_on_a_cpu_is_the_native_kernel():
    batch = make_batch([(5, 90)])
    assert_identical(batch.clone().run(), batch.run("cpu"))


def test_importing_the_op_loads_no_native_library_and_no_vllm():
    code = (
        "import vllm_dsv4_indexer.ops, sys; assert 'vllm' not in sys.modules; "
        "assert 'libdsv4_indexer' not in open('/proc/self/maps').read()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def fresh_library():
    cpu.native.cache_clear()
    yield
    cpu.native.cache_clear()


def test_a_missing_library_says_where_it_was_looked_for(monkeypatch, fresh_library):
    monkeypatch.setattr(cpu, "_LIBRARY", "vllm_dsv4_indexer/none.so")
    with pytest.raises(ImportError, match=r"looked for .*none\.so; install the package with `pip install \.`"):
        make_batch([(0, 4)]).run()


def test_an_unknown_instruction_set_is_refused(monkeypatch, fresh_library):
    monkeypatch.setenv("DSV4_INDEXER_ISA", "sse9")
    with pytest.raises(ValueError, match="DSV4_INDEXER_ISA is 'sse9'; it names one of avx512, avx2, generic"):
        make_batch([(0, 4)]).run()


def test_prepare_says_what_is_wrong_before_the_first_call():
    code = "from vllm_dsv4_indexer import ops; ops.prepare('cpu', 'cpu', 'fp8_pow2')"
    environment = os.environ | {"DSV4_INDEXER_ISA": "sse9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "DSV4_INDEXER_ISA is 'sse9'; it names one of avx512, avx2, generic" in done.stderr
