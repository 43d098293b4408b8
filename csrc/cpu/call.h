// One layer's call, as the kernels see it, and the kernels: one of each algorithm and instruction
// set.
//
// Plain pointers: the kernels are compiled for newer CPUs and must not instantiate the standard
// library. `static`: this header is compiled once per instruction set, and a shared inline copy
// built for AVX-512 could be the one that the linker keeps for every CPU.
#pragma once

#include "../plan.h"
#include "abi.h"

namespace dsv4 {

struct LayerCall {
  const LayerArguments& layer;
  ParallelFor parallel_for;
  const void* kv_score;
  int64_t kv_score_stride;
  bool is_bf16;
  int64_t tokens;
  int64_t early;
  bool unique;
  // Sections of the plan.
  const int64_t *positions, *requests, *state_slots, *k_slots, *windows, *sources;
};

static inline float* state_row(const LayerCall& call, int64_t slot) {
  const LayerArguments& l = call.layer;
  return l.state + slot / l.state_page * l.state_page_stride +
         slot % l.state_page * l.state_row_stride;
}

using Kernel = bool (*)(const LayerCall& call);  // false: parallel_for failed

#define DSV4_KERNELS(isa)                       \
  namespace isa {                               \
  bool one_pass(const LayerCall& call);         \
  bool overlay_scan(const LayerCall& call);     \
  bool scatter_pool(const LayerCall& call);     \
  bool floor(const LayerCall& call);            \
  bool floor_past_cache(const LayerCall& call); \
  }
DSV4_KERNELS(generic)
DSV4_KERNELS(avx2)
DSV4_KERNELS(avx512)
#undef DSV4_KERNELS

}  // namespace dsv4
