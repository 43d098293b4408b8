// The launches of each algorithm, in order: what csrc/ascend/launch.asc does on a device and the
// emulation on a host.
#pragma once

#include <cstring>

#include "compress.h"
#include "planner.h"

namespace dsv4 {

template <Algorithm kName>
struct Launch {
  static constexpr Algorithm kAlgorithm = kName;
};

// Calls `launch(Launch<...>{})` for each launch of `algorithm`; false: there is no such algorithm.
template <class F>
bool for_each_launch(const char* algorithm, F launch) {
  if (std::strcmp(algorithm, "one_pass") == 0) {
    launch(Launch<kOnePass>{});
  } else if (std::strcmp(algorithm, "scatter_pool") == 0) {
    launch(Launch<kSave>{});
    launch(Launch<kPoolState>{});
  } else if (std::strcmp(algorithm, "overlay_scan") == 0) {
    launch(Launch<kPoolScan>{});
    launch(Launch<kSave>{});
  } else {
    return false;
  }
  return true;
}

}  // namespace dsv4
