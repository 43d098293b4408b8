// How a core's unified buffer is shared out, by geometry. The kernel (compress.h) asserts that all
// of it fits.
#pragma once

#include <cstdint>

#include "../layout.h"

namespace dsv4 {

// Bytes, of A2 and A3: 192 KiB without the framework's 256 and the 8 KiB that the API has by
// default. A5 has more.
constexpr int64_t kUnifiedBuffer = 192 * 1024 - 256 - 8 * 1024;

// There is none for the ratio 128: the rows of one window are 512 KiB.
template <class G>
struct Budget;

template <>
struct Budget<Indexer> {
  static constexpr int kFrames = 4;   // of a tile: as many windows at most
  static constexpr int kTiles = 3;    // one is loaded, one pooled and one stored
  static constexpr int kBatch = 16;   // windows that are finished together
  static constexpr int kBatches = 2;  // that are on their way out
};

template <>
struct Budget<Main4> {
  static constexpr int kFrames = 1;
  static constexpr int kTiles = 2;
  static constexpr int kBatch = 8;
  static constexpr int kBatches = 1;  // it has left long before the next eight windows are here
};

}  // namespace dsv4
