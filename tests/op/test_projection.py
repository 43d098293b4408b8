"""The projection in front of the op, against one in float64; by every method that this CPU has."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from batches import make_batch
from vllm_dsv4_indexer.contract import KV_WIDTH, ROW_WIDTH
from vllm_dsv4_indexer.ops import projection

METHODS = pytest.mark.parametrize("method", projection.methods())
HIDDEN = pytest.mark.parametrize("hidden", (4096, 7168))  # Flash and Pro
REQUESTS = [(0, 512)] * 4


def draw(tokens: int, hidden: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states and the weights with the spread of a DeepSeek-V4 layer's, in bfloat16."""
    numbers = torch.Generator().manual_seed(seed)
    x = torch.rand(tokens, hidden, generator=numbers) * 0.1 - 0.05
    spread = torch.tensor([0.0293, 0.0512]).repeat_interleave(KV_WIDTH)[:, None]  # wkv, wgate
    return x.bfloat16(), (spread * torch.randn(ROW_WIDTH, hidden, generator=numbers)).bfloat16()


def in_float64(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


def codes(kv_score: Tensor) -> Tensor:
    """The fp8 codes that the reference stores for prompts of these projections."""
    batch = replace(make_batch(REQUESTS), kv_score=kv_score.float()).compress("reference")
    return torch.tensor([list(entry) for entry in batch.entries()])


def share_changed(kv_score: Tensor, expected: Tensor) -> float:
    return float((codes(kv_score) != codes(expected)).double().mean())


@METHODS
@HIDDEN
def test_at_most_two_codes_in_ten_thousand_are_not_those_of_a_float64_projection(method, hidden):
    x, weight = draw(sum(n for _, n in REQUESTS), hidden)
    kv_score = projection.project(x, projection.prepare_weight(weight, method))
    assert share_changed(kv_score, in_float64(x, weight)) <= 2e-4


@HIDDEN
def test_rounding_the_projection_to_bfloat16_changes_one_code_in_twenty(hidden):
    x, weight = draw(sum(n for _, n in REQUESTS), hidden)
    expected = in_float64(x, weight)
    assert 0.04 <= share_changed(expected.bfloat16(), expected) <= 0.1


@METHODS
@pytest.mark.parametrize("hidden", (2, 6, 512, 2048, 2050, 4100))
@pytest.mark.parametrize("tokens", (0, 1, 5, 6, 7, 95, 96, 97, 257))
def test_every_number_of_tokens_and_hidden_size_is_projected_to_fp32_accuracy(
    method, hidden, tokens
):
    x, weight = draw(tokens, hidden, seed=tokens)
    kv_score = projection.project(x, projection.prepare_weight(weight, method))
    expected = in_float64(x, weight)
    assert kv_score.dtype is torch.float32 and kv_score.shape == (tokens, ROW_WIDTH)
    assert (kv_score - expected).norm() <= 1e-6 * expected.norm()


@METHODS
def test_rows_of_x_may_lie_apart(method):
    x, weight = draw(9, 64)
    weight = projection.prepare_weight(weight, method)
    padded = torch.full((9, 100), torch.nan, dtype=torch.bfloat16)
    padded[:, :64] = x
    assert projection.project(padded[:, :64], weight).equal(projection.project(x, weight))


@pytest.mark.skipif("bf16_dot" not in projection.methods(), reason="this CPU has no AVX512_BF16")
@pytest.mark.parametrize("threads", (1, 2, 3))
def test_by_bf16_dot_a_row_has_the_same_bits_in_any_call_and_on_any_number_of_threads(
    threads, set_threads
):
    x, weight = draw(200, 4100)
    weight = projection.prepare_weight(weight, "bf16_dot")
    expected = torch.cat([projection.project(row, weight) for row in x.split(1)])
    set_threads(threads)
    for length in (200, 97, 7):
        parts = [projection.project(part, weight) for part in x.split(length)]
        assert torch.cat(parts).equal(expected)


@METHODS
def test_a_weight_takes_at_most_twice_its_memory(method):
    _, weight = draw(0, 64)
    prepared = projection.prepare_weight(weight, method)
    assert projection.method_of(prepared) == method
    assert prepared.untyped_storage().nbytes() == {"bf16_dot": 1, "fp32": 2}[method] * weight.nbytes


@METHODS
@pytest.mark.parametrize(
    "dtype, hidden", ((torch.float16, 64), (torch.float32, 64), (torch.bfloat16, 63))
)
def test_what_only_fp32_can_do_is_done_in_fp32(method, dtype, hidden):
    x, weight = (tensor.to(dtype) for tensor in draw(5, hidden))
    prepared = projection.prepare_weight(weight, method)
    assert projection.method_of(prepared) == "fp32"
    torch.testing.assert_close(projection.project(x, prepared), in_float64(x, weight).float())


@METHODS
def test_torch_compile_and_its_checks_accept_the_op(method):
    x, weight = draw(5, 64)
    arguments = x, projection.prepare_weight(weight, method)
    torch.library.opcheck(torch.ops.dsv4_indexer.project, arguments)


@METHODS
def test_an_x_that_does_not_fit_is_an_error_that_says_how(method):
    x, weight = draw(5, 64)
    prepared = projection.prepare_weight(weight, method)
    for wrong in (x[:, :62], x[0], x.T, x[:, ::2].repeat(1, 2)[:, ::2]):
        with pytest.raises(ValueError, match="rows of 64 contiguous values"):
            projection.project(wrong, prepared)
    with pytest.raises(ValueError, match=r"weight has shape \[511, 64\]; expected \[512, hidden\]"):
        projection.prepare_weight(weight[1:], method)


def test_a_method_that_the_cpu_lacks_is_an_error_that_names_those_it_has():
    with pytest.raises(ValueError, match="method is 'fp16'; this CPU has .*fp32"):
        projection.prepare_weight(draw(0, 64)[1], "fp16")
