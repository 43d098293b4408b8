// The names of AscendC that the kernels use. Its functions on tensors are found by their arguments.
#pragma once

#include "kernel_operator.h"

namespace dsv4 {

using AscendC::BinaryRepeatParams;
using AscendC::DataCopyExtParams;
using AscendC::DataCopyPadExtParams;
using AscendC::GlobalTensor;
using AscendC::HardEvent;
using AscendC::LocalTensor;
using AscendC::RoundMode;
using AscendC::TBuf;
using AscendC::TPipe;
using AscendC::TPosition;
using AscendC::TQue;
using AscendC::TQueBind;

constexpr uint32_t kBlockBytes = 32;  // of the unified buffer: what is aligned is aligned to it

__aicore__ inline uint32_t Blocks(uint32_t bytes) {
  return (bytes + kBlockBytes - 1) / kBlockBytes;
}

// What the first pipe of `kEvent` was given so far is over before the second goes on.
template <HardEvent kEvent>
__aicore__ inline void Order(TPipe* pipe) {
  const AscendC::TEventID id = pipe->FetchEventID<kEvent>();
  AscendC::SetFlag<kEvent>(id);
  AscendC::WaitFlag<kEvent>(id);
}

// The value at the start of `source`, by the scalar unit, for what changes between launches: its
// cache may not have noticed.
template <class T>
__aicore__ inline T ReadFresh(const GlobalTensor<T>& source) {
  using namespace AscendC;
  DataCacheCleanAndInvalid<T, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(source);
  return source.GetValue(0);
}

}  // namespace dsv4
