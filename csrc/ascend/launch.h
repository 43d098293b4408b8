// The launches of each algorithm, in order: what csrc/ascend/launch.asc does on a device and the
// emulation on a host.
#pragma once

#include <cstring>
#include <type_traits>

#include "comparison/baselines.h"
#include "compress.h"
#include "planner.h"

namespace dsv4 {

// The kernels of a layer. kOnePass is the product's.
enum LayerKernel { kOnePass, kSave, kPoolState, kPoolScan };

template <LayerKernel kName>
struct Launch {
  static constexpr LayerKernel kKernel = kName;
};

template <class Kernel, class Arguments>
__aicore__ inline void run_kernel(const Arguments& arguments, const Tiling& tiling) {
  TPipe pipe;
  Kernel kernel;
  kernel.Init(&pipe, arguments, tiling);
  kernel.Process();
}

template <class Tokens>
__aicore__ inline void plan(const PlanArguments& arguments, const Tiling& tiling) {
  run_kernel<Planner<Tokens>>(arguments, tiling);
}

template <LayerKernel kKernel, class G, int64_t kFormat>
__aicore__ inline void run(const RunArguments& arguments, const Tiling& tiling) {
  static_assert(kKernel == kOnePass || std::is_same_v<G, Indexer>);
  if constexpr (kKernel == kOnePass) run_kernel<Compress<G, kFormat>>(arguments, tiling);
  if constexpr (kKernel == kSave) run_kernel<SaveRows>(arguments, tiling);
  if constexpr (kKernel == kPoolState) run_kernel<PoolRows<kFormat, false>>(arguments, tiling);
  if constexpr (kKernel == kPoolScan) run_kernel<PoolRows<kFormat, true>>(arguments, tiling);
}

// Calls `launch(Launch<...>{})` for each launch of `algorithm`; false: there is no such algorithm
// for this head dimension.
template <class F>
bool for_each_launch(const char* algorithm, int64_t head_dim, F launch) {
  const bool compared = head_dim == Indexer::kHeadDim;  // the others serve the indexer alone
  if (std::strcmp(algorithm, "one_pass") == 0) {
    launch(Launch<kOnePass>{});
  } else if (compared && std::strcmp(algorithm, "scatter_pool") == 0) {
    launch(Launch<kSave>{});
    launch(Launch<kPoolState>{});
  } else if (compared && std::strcmp(algorithm, "overlay_scan") == 0) {
    launch(Launch<kPoolScan>{});
    launch(Launch<kSave>{});
  } else {
    return false;
  }
  return true;
}

}  // namespace dsv4
