// Transfers between global memory and the unified buffer, and Copy within it.
// SIMD-API/基础API/Memory矢量计算/数据搬运
#pragma once

#include "vector.h"

namespace AscendC {

struct DataCopyExtParams {
  DataCopyExtParams(uint16_t count, uint32_t length, uint32_t source_gap, uint32_t target_gap,
                    uint32_t)
      : blockCount(count), blockLen(length), srcStride(source_gap), dstStride(target_gap) {}
  uint16_t blockCount;
  // Bytes; gaps in bytes of global memory, in 32 bytes of the unified buffer.
  uint32_t blockLen, srcStride, dstStride;
};

template <class T>
struct DataCopyPadExtParams {
  bool isPad = false;
  uint8_t leftPadding = 0, rightPadding = 0;
  T paddingValue = {};
};

namespace detail {

template <class T>
uint8_t* on_host(__gm__ T* global) {
  return reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(global));
}

inline uint32_t padded(uint32_t bytes) {
  return (bytes + emulation::kBlock - 1) / emulation::kBlock * emulation::kBlock;
}

// [offset, offset + bytes) of an aligned tensor, block by block.
template <class T, class F>
void blocks(const LocalTensor<T>& tensor, uint32_t offset, uint32_t bytes, const char* what,
            F use) {
  tensor.check(offset, bytes, what);
  for (uint32_t done = 0; done < bytes; done += emulation::kBlock)
    use(tensor.address() + offset + done, std::min(emulation::kBlock, bytes - done), done);
}

template <class T>
void check_transfer(const LocalTensor<T>& local, const DataCopyExtParams& p, const char* what) {
  using emulation::require;
  require(p.blockCount >= 1 && p.blockCount <= 4095,
          "range: %s with blockCount %d; it is 1 to 4095", what, p.blockCount);
  require(p.blockLen >= 1 && p.blockLen <= 2097151 && p.blockLen % sizeof(T) == 0,
          "range: %s with blockLen %u; it is 1 to 2097151 and a multiple of the element's size",
          what, p.blockLen);
  require(local.position() != TPosition::VECCALC, "position: %s and a buffer at VECCALC", what);
  static_assert(!std::is_same_v<T, fp8_e4m3fn_t>, "DataCopyPad lists no fp8 type");
  local.check_aligned(what);
}

template <class T>
void to_local(const LocalTensor<T>& target, const GlobalTensor<T>& source,
              const DataCopyExtParams& p, const char* what) {
  check_transfer(target, p, what);
  emulation::Core& core = emulation::core;
  core.issue(emulation::kMte2);
  ++core.counts.reads;
  core.counts.read_bytes += int64_t{p.blockCount} * p.blockLen;
  const uint8_t* from = on_host(source.GetPhyAddr());
  for (uint32_t i = 0, at = 0; i < p.blockCount; ++i) {
    emulation::memory.touch(core, reinterpret_cast<uintptr_t>(from), p.blockLen, false, what);
    blocks(target, at, p.blockLen, what, [&](uint32_t address, uint32_t bytes, uint32_t done) {
      std::memcpy(core.write(address, bytes, what), from + done, bytes);
    });
    // What fills up the last block is not defined: it stays uninitialised.
    from += p.blockLen + p.srcStride, at += padded(p.blockLen) + p.dstStride * emulation::kBlock;
  }
}

template <class T>
void to_global(const GlobalTensor<T>& target, const LocalTensor<T>& source,
               const DataCopyExtParams& p, const char* what) {
  check_transfer(source, p, what);
  emulation::Core& core = emulation::core;
  core.issue(emulation::kMte3);
  ++core.counts.writes;
  core.counts.write_bytes += int64_t{p.blockCount} * p.blockLen;
  uint8_t* to = on_host(target.GetPhyAddr());
  for (uint32_t i = 0, at = 0; i < p.blockCount; ++i) {
    emulation::memory.touch(core, reinterpret_cast<uintptr_t>(to), p.blockLen, true, what);
    blocks(source, at, p.blockLen, what, [&](uint32_t address, uint32_t bytes, uint32_t done) {
      std::memcpy(to + done, core.read(address, bytes, what), bytes);
    });
    to += p.blockLen + p.dstStride, at += padded(p.blockLen) + p.srcStride * emulation::kBlock;
  }
}

}  // namespace detail

// DataCopyPad（GMToUB非对齐数据搬运）.md, DataCopyPad（UBToGM非对齐数据搬运）.md
template <class T>
void DataCopyPad(const LocalTensor<T>& target, const GlobalTensor<T>& source,
                 const DataCopyExtParams& params, const DataCopyPadExtParams<T>& padding) {
  emulation::require(!padding.isPad && !padding.leftPadding && !padding.rightPadding,
                     "range: padding is not emulated");
  detail::to_local(target, source, params, "DataCopyPad to the unified buffer");
}
template <class T>
void DataCopyPad(const GlobalTensor<T>& target, const LocalTensor<T>& source,
                 const DataCopyExtParams& params) {
  detail::to_global(target, source, params, "DataCopyPad to global memory");
}

// DataCopy（GM与UB连续数据搬运）.md: whole blocks, from global memory to VECIN and from VECOUT back
template <class T>
void DataCopy(const LocalTensor<T>& target, const GlobalTensor<T>& source, uint32_t count) {
  emulation::require(count * sizeof(T) % emulation::kBlock == 0,
                     "alignment: DataCopy of %d bytes, not a multiple of 32",
                     (int)(count * sizeof(T)));
  emulation::require(target.position() == TPosition::VECIN,
                     "position: DataCopy to another position than VECIN");
  detail::to_local(target, source, {1, uint32_t(count * sizeof(T)), 0, 0, 0},
                   "DataCopy to the unified buffer");
}
template <class T>
void DataCopy(const GlobalTensor<T>& target, const LocalTensor<T>& source, uint32_t count) {
  emulation::require(count * sizeof(T) % emulation::kBlock == 0,
                     "alignment: DataCopy of %d bytes, not a multiple of 32",
                     (int)(count * sizeof(T)));
  emulation::require(source.position() == TPosition::VECOUT,
                     "position: DataCopy from another position than VECOUT");
  detail::to_global(target, source, {1, uint32_t(count * sizeof(T)), 0, 0, 0},
                    "DataCopy to global memory");
}

// Copy（UBToUB掩码式高维数据搬运）.md
struct CopyRepeatParams {
  CopyRepeatParams(uint16_t target_block, uint16_t source_block, uint16_t target_repeat,
                   uint16_t source_repeat)
      : dstStride(target_block),
        srcStride(source_block),
        dstRepeatSize(target_repeat),
        srcRepeatSize(source_repeat) {}
  uint16_t dstStride, srcStride, dstRepeatSize, srcRepeatSize;
};
template <class T>
void Copy(const LocalTensor<T>& target, const LocalTensor<T>& source, uint64_t mask,
          detail::Repeats repeats, const CopyRepeatParams& p) {
  emulation::require(target.position() != source.position(),
                     "position: Copy between two buffers of one position");
  detail::elementwise(
      "Copy", detail::sliced<T>(mask, repeats),
      detail::Strided<T>{target, p.dstStride, p.dstRepeatSize}, [](T x) { return x; },
      detail::Strided<T>{source, p.srcStride, p.srcRepeatSize});
}

}  // namespace AscendC
