// The floor of the benchmark, compiled once per instruction set: no compressor can be faster than
// moving the bytes that it must move, kv_score in once, every state row and K entry out once, to
// where the arguments say.

#include "../pages.h"
#include "../vec.h"

namespace {

using namespace dsv4;

constexpr int64_t kGrain = 128;  // tokens that are worth a thread

template <class T, void (*store_row)(float*, Floats)>
void move_bytes(int64_t begin, int64_t end, void* context) {
  const LayerCall& call = *static_cast<const LayerCall*>(context);
  for (int64_t token = begin; token < end; ++token) {
    const T* from = static_cast<const T*>(call.kv_score) + token * call.kv_score_stride;
    if (const int64_t slot = call.state_slots[token]; slot >= 0) {
      float* row = state_row(call, slot);
      for (int c = 0; c < kRowWidth; c += kLanes) store_row(row + c, load(from + c));
    }
    if (const int64_t slot = call.k_slots[token]; slot >= 0) {
      const Fp8Place place = fp8_place(call.layer, slot);
      std::memcpy(place.codes, from, kHeadDim);
      std::memcpy(place.scale, from, sizeof(float));
    }
  }
  wait_for_stores();
}

bool run(const LayerCall& call, Task task) {
  return call.parallel_for(0, call.tokens, kGrain, task, const_cast<LayerCall*>(&call)) == 0;
}

}  // namespace

// fp8 pages only. What they write is no result.
bool dsv4::DSV4_ISA::floor(const LayerCall& call) {
  return run(call, call.is_bf16 ? move_bytes<bfloat16, store> : move_bytes<float, store>);
}

// With stores that go around the caches, which is faster where the state is not in them; the rows
// must be aligned to a vector.
bool dsv4::DSV4_ISA::floor_past_cache(const LayerCall& call) {
  return run(call, call.is_bf16 ? move_bytes<bfloat16, store_past_cache>
                                : move_bytes<float, store_past_cache>);
}
