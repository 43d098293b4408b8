// The floor of the benchmark, compiled once per instruction set: no compressor can be faster than
// moving the bytes that it must move, kv_score in once, every state row and K entry out once, to
// where the arguments say.

#include "../pages.h"
#include "../vec.h"

namespace {

using namespace dsv4;

constexpr int64_t kGrain = 128;  // tokens that are worth a thread

void store_entry(const LayerArguments& layer, int64_t slot, const void* from) {
  if (layer.k_format == kFp8DsMla) {
    const DsMlaPlace place = ds_mla_place(layer, slot);
    std::memcpy(place.codes, from, kDsMlaDataBytes);
    std::memcpy(place.exponents, from, kDsMlaScaleBytes);
  } else {
    const Fp8Place place = fp8_place(layer, slot);
    std::memcpy(place.codes, from, kHeadDim);
    std::memcpy(place.scale, from, sizeof(float));
  }
}

template <class G, class T, void (*store_row)(float*, Floats)>
void move_bytes(int64_t begin, int64_t end, void* context) {
  const LayerCall& call = *static_cast<const LayerCall*>(context);
  for (int64_t token = begin; token < end; ++token) {
    const T* from = static_cast<const T*>(call.kv_score) + token * call.kv_score_stride;
    if (const int64_t slot = call.state_slots[token]; slot >= 0) {
      float* row = state_row(call, slot);
      for (int c = 0; c < G::kRowWidth; c += kLanes) store_row(row + c, load(from + c));
    }
    if (const int64_t slot = call.k_slots[token]; slot >= 0) store_entry(call.layer, slot, from);
  }
  wait_for_stores();
}

bool in_parallel(const LayerCall& call, Task task) {
  return call.parallel_for(0, call.tokens, kGrain, task, const_cast<LayerCall*>(&call)) == 0;
}

}  // namespace

namespace dsv4::DSV4_ISA {

// fp8 pages only. What they write is no result.
template <class G>
bool floor(const LayerCall& call) {
  return in_parallel(call,
                     call.is_bf16 ? move_bytes<G, bfloat16, store> : move_bytes<G, float, store>);
}

// With stores that go around the caches, which is faster where the state is not in them; the rows
// must be aligned to a vector.
template <class G>
bool floor_past_cache(const LayerCall& call) {
  return in_parallel(call, call.is_bf16 ? move_bytes<G, bfloat16, store_past_cache>
                                        : move_bytes<G, float, store_past_cache>);
}

#define DSV4_INSTANTIATE(G)                      \
  template bool floor<G>(const LayerCall& call); \
  template bool floor_past_cache<G>(const LayerCall& call);
DSV4_INSTANTIATE(Indexer)
DSV4_INSTANTIATE(Main4)
DSV4_INSTANTIATE(Main128)
#undef DSV4_INSTANTIATE

}  // namespace dsv4::DSV4_ISA
