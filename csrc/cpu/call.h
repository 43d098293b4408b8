// What is compiled once per instruction set: the kernels, and the calls that they get.
//
// CMakeLists.txt compiles their files with the options of an instruction set, DSV4_ISA for its
// name and DSV4_LANES for the floats of a vector; exports.cpp picks at run time. A file defines
// functions of namespace dsv4::DSV4_ISA. All else in it, and in the headers that it includes, is
// `static` or in a nameless namespace, and it instantiates nothing of the standard library: of a
// shared inline function the linker keeps one copy, which could be the one built for AVX-512.
//
// `G` is a Geometry, wherever it stands.
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

using Kernel = bool (*)(const LayerCall& call);  // false: parallel_for failed

#define DSV4_KERNELS(isa)                          \
  namespace isa {                                  \
  template <class G>                               \
  bool one_pass(const LayerCall& call);            \
  template <class G>                               \
  bool one_pass_past_cache(const LayerCall& call); \
  template <class G>                               \
  bool floor(const LayerCall& call);               \
  template <class G>                               \
  bool floor_past_cache(const LayerCall& call);    \
  bool overlay_scan(const LayerCall& call);        \
  bool scatter_pool(const LayerCall& call);        \
  }
DSV4_KERNELS(generic)
DSV4_KERNELS(avx2)
DSV4_KERNELS(avx512)
#undef DSV4_KERNELS

struct ProjectionCall {
  const uint16_t* x;  // [tokens, hidden] bf16
  int64_t x_stride;
  int64_t tokens;
  int64_t hidden;
  const uint16_t* packed;  // the weight: projection.cpp
  float* out;              // [tokens, 512]
  ParallelFor parallel_for;
};

namespace avx512_bf16 {
int32_t project(const ProjectionCall& call);  // 0, or what parallel_for returned
}

}  // namespace dsv4
