"""The op as torch and Python see it."""

import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batches import IMPLS_WHERE_ROWS_ARE_UNIQUE, assert_identical, make_batch
from vllm_dsv4_indexer import ops
from vllm_dsv4_indexer.contract import Call, Extents, Layer, Step
from vllm_dsv4_indexer.ops import cpu, library

OPS = torch.ops.dsv4_indexer
# Not the one that compares results: only EARLY windows' sources are written.
OF_PLAN = ("test_schema", "test_autograd_registration", "test_faketensor")
IMPLS_AND_FORMATS = pytest.mark.parametrize(
    "impl, k_format",
    [(i, f) for i in IMPLS_WHERE_ROWS_ARE_UNIQUE for f in ("fp8_pow2", "int8_hadamard")]
    + [("reference", "fp8_amax")],
)


@IMPLS_AND_FORMATS
def test_opcheck_passes_for_compress(impl, k_format):
    batch = make_batch([(5, 9)], k_format=k_format)
    torch.library.opcheck(OPS.compress.default, batch.call, {"k_format": k_format, "impl": impl})


@pytest.mark.parametrize("impl", IMPLS_WHERE_ROWS_ARE_UNIQUE)
def test_opcheck_passes_for_plan(impl):
    call = make_batch([(5, 9)]).call
    extents = Extents.of(call.layer)._asdict()
    torch.library.opcheck(OPS.plan.default, call.step, extents | {"impl": impl}, test_utils=OF_PLAN)


@IMPLS_AND_FORMATS
def test_opcheck_passes_for_run(impl, k_format):
    batch = make_batch([(5, 9)], k_format=k_format)
    ape, norm_weight, cos_sin_cache, *caches = batch.call.layer
    arguments = (batch.kv_score, ape, norm_weight, cos_sin_cache, batch.plan(impl), *caches)
    torch.library.opcheck(OPS.run.default, arguments, {"k_format": k_format, "impl": impl})


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def test_torch_compile_sees_the_mutation():
    batch = make_batch([(5, 9)])
    expected = batch.clone().compress()

    def doubled(*tensors):
        ops.compress(*tensors)
        return tensors[8] * 2

    result = compiled(doubled)(*batch.call)
    assert_identical(batch, expected)
    assert torch.equal(result.view(torch.int32), (expected.inner_state_cache * 2).view(torch.int32))


def test_torch_compile_takes_a_plan_and_two_layers_in_one_graph():
    layers = [make_batch([(5, 9)], seed=0), make_batch([(5, 9)], seed=0)]
    layers[1].kv_score.mul_(2)
    expected = [layer.clone().compress() for layer in layers]
    bounds = [ops.BoundLayer(layer.call.layer) for layer in layers]

    def step(kv_scores, *tensors):
        made = ops.plan(*tensors, **bounds[0].extents._asdict())
        for bound, kv_score in zip(bounds, kv_scores):
            bound.run(kv_score, made)

    compiled(step)([layer.kv_score for layer in layers], *layers[0].call.step)
    for layer, alone in zip(layers, expected):
        assert_identical(layer, alone)


def test_one_graph_of_dynamic_shapes_plans_steps_of_any_length():
    batches = [make_batch([(5, 9)]), make_batch([(5, 9), (0, 40)]), make_batch([(3, 70)])]

    @functools.partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=True)
    def step(kv_score, layer, tensors, extents):
        ops.run(kv_score, *layer[:3], ops.plan(*tensors, **extents), *layer[3:])

    for batch in batches:
        expected = batch.clone().compress()
        step(
            batch.kv_score,
            tuple(batch.call.layer),
            tuple(batch.call.step),
            Extents.of(batch.call.layer)._asdict(),
        )
        assert_identical(batch, expected)


def test_the_default_on_a_cpu_is_the_native_kernel():
    batch = make_batch([(5, 90)])
    assert_identical(batch.clone().compress(), batch.compress("cpu"))


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
    with pytest.raises(
        ImportError, match=r"looked for .*none\.so; install the package with `pip install \.`"
    ):
        make_batch([(0, 4)]).compress()


def test_a_library_from_other_sources_is_refused_by_its_path(monkeypatch, fresh_library):
    monkeypatch.setattr(library, "_sources", lambda folder: "of a later commit")
    with pytest.raises(
        ImportError,
        match=r"libdsv4_indexer_cpu\.so was built from other sources than csrc has now: install",
    ):
        make_batch([(0, 4)]).compress()


def test_an_old_copy_beside_the_package_does_not_hide_a_later_build(
    monkeypatch, fresh_library, tmp_path
):
    built = next(path for path in library._candidates(cpu._LIBRARY) if path.exists())
    old = tmp_path / "old.so"
    subprocess.run(
        ["cc", "-shared", "-o", old, "-x", "c", "-"], input="int nothing;", text=True, check=True
    )
    cut_short = tmp_path / "cut.so"
    cut_short.write_bytes(built.read_bytes()[:100])
    monkeypatch.setattr(library, "_candidates", lambda _: [cut_short, old, built])
    make_batch([(0, 4)]).compress()
    assert cpu.native().library._name == str(built)


def test_an_unknown_instruction_set_is_refused(monkeypatch, fresh_library):
    monkeypatch.setenv("DSV4_INDEXER_ISA", "sse9")
    with pytest.raises(
        ValueError, match="DSV4_INDEXER_ISA is 'sse9'; it names one of avx512, avx2, generic"
    ):
        make_batch([(0, 4)]).compress()


def test_prepare_says_what_is_wrong_before_the_first_call():
    code = "from vllm_dsv4_indexer import ops; ops.prepare('cpu', 'cpu', 'fp8_pow2')"
    environment = os.environ | {"DSV4_INDEXER_ISA": "sse9"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "DSV4_INDEXER_ISA is 'sse9'; it names one of avx512, avx2, generic" in done.stderr


def test_the_schemas_have_the_fields_of_the_contract_in_its_order():
    def arguments(op) -> list[str]:
        return [argument.name for argument in op.default._schema.arguments]

    def types(op) -> list[str]:
        return [str(argument.type) for argument in op.default._schema.arguments]

    options = ["eps", "k_format", "impl"]
    ape, norm_weight, cos_sin_cache, *caches = Layer._fields
    weights = [ape, norm_weight, cos_sin_cache]
    assert arguments(OPS.compress) == [*Call._fields, *options]
    assert arguments(OPS.plan) == [*Step._fields, *Extents._fields, "ratio", "impl"]
    assert arguments(OPS.run) == ["kv_score", *weights, "plan", *caches, *options]
    optional = ["Optional[Tensor]", "float", "str", "Optional[str]"]
    assert types(OPS.compress) == ["Tensor"] * (len(Call._fields) - 1) + optional
    assert types(OPS.plan) == ["Tensor"] * 5 + ["int"] * 5 + ["Optional[str]"]
    assert types(OPS.run) == ["Tensor"] * 7 + optional
    for function, op in ((ops.compress, OPS.compress), (ops.plan, OPS.plan), (ops.run, OPS.run)):
        assert list(inspect.signature(function).parameters) == arguments(op)


def test_the_example_of_an_engine_of_ones_own_runs():
    example = Path(__file__).parents[2] / "examples" / "own_engine.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, check=True)
    assert "2 plans; 4 calls on 52 tokens wrote 12 entries" in done.stdout
