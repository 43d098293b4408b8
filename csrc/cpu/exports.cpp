// The exported functions (abi.h).

#include <cstring>

#include "call.h"
#include "planner.h"

namespace dsv4 {
namespace {

// Whether the plan was made for such an algorithm, for that many tokens, and for caches no larger
// than the layer's.
bool fits(const PlanHeader& plan, int64_t layout, const LayerArguments& layer,
          const KvScore& kv_score) {
  return plan.layout == layout && plan.tokens == kv_score.tokens &&
         plan.state_page == layer.state_page && plan.state_pages <= layer.state_pages &&
         plan.k_entries <= layer.k_pages * layer.k_page && plan.max_pos <= layer.cos_sin_rows;
}

template <Kernel kernel, int64_t layout>
int64_t run(const LayerArguments* layer, ParallelFor parallel_for, const int64_t* plan,
            const KvScore* kv_score) {
  const PlanHeader& header = *reinterpret_cast<const PlanHeader*>(plan);
  if (!fits(header, layout, *layer, *kv_score)) return kPlanDoesNotFit;
  const int64_t tokens = kv_score->tokens;
  const LayerCall call{*layer,
                       parallel_for,
                       kv_score->rows,
                       kv_score->stride,
                       kv_score->is_bf16 != 0,
                       tokens,
                       header.early,
                       header.unique != 0,
                       plan + plan_positions(tokens),
                       plan + plan_requests(tokens),
                       plan + plan_state_slots(tokens),
                       plan + plan_k_slots(tokens),
                       plan + plan_windows(tokens),
                       plan + plan_sources(tokens)};
  return kernel(call) ? header.entries : kThreadsFailed;
}

// Whether this build has the code for `isa` and this CPU runs it.
bool usable(const char* isa) {
#if defined(__x86_64__)
  if (!std::strcmp(isa, "avx512_bf16"))
    return usable("avx512") && __builtin_cpu_supports("avx512bf16");
  if (!std::strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(isa, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !std::strcmp(isa, "generic");
}

struct Algorithm {
  const char* name;
  int head_dim, ratio;
  const char* isa;
  Run run;
};

#define DSV4_ALGORITHM(isa, algorithm, G) \
  {#algorithm, G::kHeadDim, G::kRatio, #isa, run<isa::algorithm<G>, kPlanLayout>}
#define DSV4_ALGORITHMS_OF(isa, G)                                               \
  DSV4_ALGORITHM(isa, one_pass, G), DSV4_ALGORITHM(isa, one_pass_past_cache, G), \
      DSV4_ALGORITHM(isa, floor, G), DSV4_ALGORITHM(isa, floor_past_cache, G)
#define DSV4_BASELINE(isa, algorithm) \
  {#algorithm, kHeadDim, kRatio, #isa, run<isa::algorithm, kStateOnlyLayout>}
#define DSV4_ALGORITHMS(isa)                                              \
  DSV4_ALGORITHMS_OF(isa, Indexer), DSV4_ALGORITHMS_OF(isa, Main4),       \
      DSV4_ALGORITHMS_OF(isa, Main128), DSV4_BASELINE(isa, overlay_scan), \
      DSV4_BASELINE(isa, scatter_pool)

constexpr Algorithm kAlgorithms[] = {
#if defined(__x86_64__)
    DSV4_ALGORITHMS(avx512),
    DSV4_ALGORITHMS(avx2),
#endif
    DSV4_ALGORITHMS(generic),
};
#undef DSV4_ALGORITHMS
#undef DSV4_BASELINE
#undef DSV4_ALGORITHMS_OF
#undef DSV4_ALGORITHM

}  // namespace
}  // namespace dsv4

extern "C" {

int64_t dsv4_indexer_plan(const dsv4::StepArguments* step, int64_t ratio, int64_t rule,
                          int64_t* plan, dsv4::Violation* violation) {
  return dsv4::make_plan(*step, ratio, static_cast<dsv4::Rule>(rule), plan, *violation);
}

dsv4::Run dsv4_indexer_run_for(const char* algorithm, int64_t head_dim, int64_t ratio,
                               const char* isa) {
  for (const dsv4::Algorithm& a : dsv4::kAlgorithms)
    if (!std::strcmp(a.name, algorithm) && a.head_dim == head_dim && a.ratio == ratio &&
        !std::strcmp(a.isa, isa) && dsv4::usable(isa))
      return a.run;
  return nullptr;
}

#if defined(__x86_64__)
int32_t dsv4_indexer_project(dsv4::ParallelFor parallel_for, const uint16_t* x, int64_t x_stride,
                             int64_t tokens, int64_t hidden, const uint16_t* packed, float* out) {
  return dsv4::avx512_bf16::project({x, x_stride, tokens, hidden, packed, out, parallel_for});
}
#endif

int32_t dsv4_indexer_bf16_dot() {
#if defined(__x86_64__)
  if (dsv4::usable("avx512_bf16")) return __builtin_cpu_is("amd") ? 2 : 1;
#endif
  return 0;
}

const char* dsv4_indexer_sources() { return DSV4_SOURCES; }
}
