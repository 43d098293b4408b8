// The projection in front of the op, kv_score = x * weight^T, by instructions that multiply pairs
// of bfloat16 and add them up in fp32. No library that we may call does it: vLLM's oneDNN writes
// bfloat16, torch.mm has no fp32 output on CPUs, and MKL does not use these instructions on AMD.
//
// The weight is in panels of 64 outputs: packed[panel][k / 2][output][k % 2]. A task is a block of
// tokens times a panel. Every output is added up in the order of k, whatever tokens are in the call
// and however many threads.

#include "call.h"
#include "vec.h"

namespace {

using namespace dsv4;

constexpr int kVectors = 4;  // a panel is so many vectors wide
constexpr int kPanel = kVectors * kLanes;
constexpr int kPanels = kRowWidth / kPanel;
constexpr int kRows = 6;  // tokens at a time: 24 sums, 4 weights, an x: 32 registers
constexpr int64_t kBlockRows = 16 * kRows;  // tokens that share a panel while it is in the cache
constexpr int64_t kBlockPairs = 1024;  // of k: 256 KiB of weights, in L2, and 24 KiB of x, in L1

struct Job {
  const ProjectionCall& call;
  int64_t pairs;  // hidden / 2
  int64_t block_rows;
};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Adds to each lane the products of its two pairs of bfloat16.
void add_products(Floats& sum, Ints x, Ints weights) {
  sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)weights);
}

// out[r][0..63] (+)= x[r][0..2*pairs) * packed, for kCount consecutive tokens. Blocks of k are
// summed from zero and then added: fewer roundings on the way of each product.
template <int kCount>
void multiply(const uint16_t* x, int64_t x_stride, const uint16_t* packed, int64_t pairs,
              bool first, float* out) {
  Floats sums[kCount][kVectors];
  for (int r = 0; r < kCount; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Floats{};
  for (int64_t k = 0; k < pairs; ++k) {
    Ints weights[kVectors];
    for (int v = 0; v < kVectors; ++v)
      std::memcpy(&weights[v], packed + (k * kPanel + v * kLanes) * 2, sizeof weights[v]);
    for (int r = 0; r < kCount; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * x_stride + 2 * k, sizeof pair);
      for (int v = 0; v < kVectors; ++v) add_products(sums[r][v], broadcast(pair), weights[v]);
    }
  }
  for (int r = 0; r < kCount; ++r)
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + r * kRowWidth + v * kLanes;
      store(to, first ? sums[r][v] : load(to) + sums[r][v]);
    }
}

using Multiply = decltype(&multiply<1>);
constexpr Multiply kMultiply[kRows + 1] = {nullptr,     multiply<1>, multiply<2>, multiply<3>,
                                           multiply<4>, multiply<5>, multiply<6>};

void multiply_tasks(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<const Job*>(context);
  const ProjectionCall& call = job.call;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panel = task % kPanels, first_row = task / kPanels * job.block_rows;
    const int64_t end_row = smaller(first_row + job.block_rows, call.tokens);
    const uint16_t* packed = call.packed + panel * job.pairs * kPanel * 2;
    for (int64_t k = 0; k < job.pairs; k += kBlockPairs) {
      const int64_t pairs = smaller(kBlockPairs, job.pairs - k);
      for (int64_t row = first_row; row < end_row; row += kRows)
        kMultiply[smaller(kRows, end_row - row)](
            call.x + row * call.x_stride + 2 * k, call.x_stride, packed + k * kPanel * 2, pairs,
            k == 0, call.out + row * kRowWidth + panel * kPanel);
    }
  }
}

}  // namespace

int32_t dsv4::DSV4_ISA::project(const ProjectionCall& call) {
  const int64_t blocks = (call.tokens + kBlockRows - 1) / kBlockRows;
  const int64_t rows = (call.tokens + blocks - 1) / blocks;  // equal blocks: equally much work
  Job job{call, call.hidden / 2, (rows + kRows - 1) / kRows * kRows};
  return call.parallel_for(0, blocks * kPanels, 1, multiply_tasks, &job);
}
