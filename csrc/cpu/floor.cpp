// The floor of the benchmark, compiled once per instruction set: no compressor can be faster than moving the bytes
// that it must move, kv_score in once, every state row and K entry out once, to where the arguments say.

#include "../layout.h"
#include "abi.h"
#include "vec.h"

namespace {

using namespace dsv4;

constexpr int64_t kGrain = 128;  // tokens that are worth a thread

template <class T, void (*store_row)(float*, Floats)>
void move_bytes(int64_t begin, int64_t end, void* context) {
  const Arguments& a = *static_cast<const Arguments*>(context);
  for (int64_t token = begin; token < end; ++token) {
    const T* from = static_cast<const T*>(a.kv_score) + token * a.kv_score_stride;
    if (const int64_t slot = a.state_slots[token]; slot >= 0) {
      float* row = a.state + slot / a.state_page * a.state_page_stride + slot % a.state_page * a.state_row_stride;
      for (int c = 0; c < kRowWidth; c += kLanes) store_row(row + c, load(from + c));
    }
    if (const int64_t slot = a.k_slots[token]; slot >= 0) {
      uint8_t* page = static_cast<uint8_t*>(a.k_cache) + slot / kFp8PageEntries * a.k_page_stride;
      std::memcpy(page + slot % kFp8PageEntries * kHeadDim, from, kHeadDim);
      std::memcpy(page + kFp8ScaleOffset + slot % kFp8PageEntries * sizeof(float), from, sizeof(float));
    }
  }
  wait_for_stores();
}

}  // namespace

#define DSV4_NAME_(isa) dsv4_indexer_floor_##isa
#define DSV4_NAME(isa) DSV4_NAME_(isa)

// `past_cache`: with stores that go around the caches, which is faster where the state is not in them; the rows must
// then be aligned to a vector. fp8 pages only. What it writes is no result, and it checks nothing.
extern "C" void DSV4_NAME(DSV4_ISA)(Arguments* a, int64_t past_cache) {
  const Task plain = a->kv_score_is_bf16 ? move_bytes<bfloat16, store> : move_bytes<float, store>;
  const Task streaming =
      a->kv_score_is_bf16 ? move_bytes<bfloat16, store_past_cache> : move_bytes<float, store_past_cache>;
  a->parallel_for(0, a->tokens, kGrain, past_cache ? streaming : plain, a);
}
