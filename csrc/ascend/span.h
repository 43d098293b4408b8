// The tokens of the core that runs.
#pragma once

#include "device.h"
#include "tiling.h"

namespace dsv4 {

struct Span {
  int64_t begin, end;
};

__aicore__ inline Span OwnSpan(int64_t tokens, const Tiling& tiling) {
  const int64_t begin = AscendC::GetBlockIdx() * tiling.tokens_per_core;
  const int64_t end = begin + tiling.tokens_per_core;
  return {begin, end < tokens ? end : tokens};
}

}  // namespace dsv4
