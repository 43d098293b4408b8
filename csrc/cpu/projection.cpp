// The projection in front of the op, kv_score = x * weight^T, by instructions that multiply pairs
// of bfloat16 and add them up in fp32. No library that we may call does it: vLLM's oneDNN writes
// bfloat16, torch.mm has no fp32 output on CPUs, and MKL does not use these instructions on AMD.
//
// The weight is in panels of 64 outputs: packed[panel][k / 2][output][k % 2]. A task is a block of
// tokens times a panel. Every output is added up in the order of k, whatever tokens are in the call
// and however many threads.

#include <algorithm>
#include <cstdint>

#include "../layout.h"
#include "abi.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace dsv4 {
namespace {

constexpr int kLanes = 16;
constexpr int kVectors = 4;  // a panel is so many vectors wide
constexpr int kPanel = kVectors * kLanes;
constexpr int kPanels = kRowWidth / kPanel;
constexpr int kRows = 6;  // tokens at a time: 24 sums, 4 weights, an x: 32 registers
constexpr int64_t kBlockRows = 16 * kRows;  // tokens that share a panel while it is in the cache
constexpr int64_t kBlockPairs = 1024;  // of k: 256 KiB of weights, in L2, and 24 KiB of x, in L1

struct Projection {
  const uint16_t* x;  // [tokens, hidden] bf16
  int64_t x_stride;
  int64_t tokens;
  int64_t pairs;  // hidden / 2
  const uint16_t* packed;
  float* out;  // [tokens, 512]
  int64_t block_rows;
};

// out[r][0..63] (+)= x[r][0..2*pairs) * packed, for kCount consecutive tokens. Blocks of k are
// summed from zero and then added: fewer roundings on the way of each product.
template <int kCount>
__attribute__((target("avx512f,avx512bf16"))) void multiply(const uint16_t* x, int64_t x_stride,
                                                            const uint16_t* packed, int64_t pairs,
                                                            bool first, float* out) {
  __m512 sums[kCount][kVectors];
  for (int r = 0; r < kCount; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh weights[kVectors];
    for (int v = 0; v < kVectors; ++v)
      weights[v] = (__m512bh)_mm512_loadu_si512(packed + (k * kPanel + v * kLanes) * 2);
    for (int r = 0; r < kCount; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, x + r * x_stride + 2 * k, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], both, weights[v]);
    }
  }
  for (int r = 0; r < kCount; ++r)
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + r * kRowWidth + v * kLanes;
      _mm512_storeu_ps(to, first ? sums[r][v] : _mm512_add_ps(_mm512_loadu_ps(to), sums[r][v]));
    }
}

using Multiply = decltype(&multiply<1>);
constexpr Multiply kMultiply[kRows + 1] = {nullptr,     multiply<1>, multiply<2>, multiply<3>,
                                           multiply<4>, multiply<5>, multiply<6>};

void multiply_tasks(int64_t begin, int64_t end, void* context) {
  const Projection& p = *static_cast<const Projection*>(context);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panel = task % kPanels, first_row = task / kPanels * p.block_rows;
    const int64_t end_row = std::min(first_row + p.block_rows, p.tokens);
    const uint16_t* packed = p.packed + panel * p.pairs * kPanel * 2;
    for (int64_t k = 0; k < p.pairs; k += kBlockPairs) {
      const int64_t pairs = std::min(kBlockPairs, p.pairs - k);
      for (int64_t row = first_row; row < end_row; row += kRows)
        kMultiply[std::min<int64_t>(kRows, end_row - row)](
            p.x + row * p.x_stride + 2 * k, p.x_stride, packed + k * kPanel * 2, pairs, k == 0,
            p.out + row * kRowWidth + panel * kPanel);
    }
  }
}

}  // namespace
}  // namespace dsv4

// out = x * weight^T for at least one token, on a CPU that has the instructions; the fields of
// Projection say what is what. Returns 0, or what parallel_for returned.
extern "C" int32_t dsv4_indexer_project(dsv4::ParallelFor parallel_for, const uint16_t* x,
                                        int64_t x_stride, int64_t tokens, int64_t hidden,
                                        const uint16_t* packed, float* out) {
  using namespace dsv4;
  const int64_t blocks = (tokens + kBlockRows - 1) / kBlockRows;
  const int64_t rows = (tokens + blocks - 1) / blocks;  // equal blocks: equally much work
  Projection p{x, x_stride, tokens, hidden / 2, packed, out, (rows + kRows - 1) / kRows * kRows};
  return parallel_for(0, blocks * kPanels, 1, multiply_tasks, &p);
}
#endif

// 0: this CPU lacks the instructions. 1: it has them. 2: and they do more products in the same time
// than fp32 multiply-adds: on AMD's CPUs twice as many, on Intel's half as many.
extern "C" int32_t dsv4_indexer_bf16_dot() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) return __builtin_cpu_is("amd") ? 2 : 1;
#endif
  return 0;
}
