// Element types, positions, and the tensors of global memory and of the unified buffer.
// SIMD-API/基础API/数据结构/{GlobalTensor,LocalTensor,内置数据类型}, 辅助数据结构/TPosition.md
#pragma once

#include "machine.h"

// The address spaces of global memory and of the unified buffer: test_spaces.py defines them.
#ifndef __gm__
#define __gm__    // NOLINT(bugprone-reserved-identifier): the names are the vendor's
#define __ubuf__  // NOLINT(bugprone-reserved-identifier)
#endif

struct half {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};
struct fp8_e4m3fn_t {
  uint8_t bits;
};

namespace AscendC {

enum class TPosition : uint8_t { GM, VECIN, VECOUT, VECCALC, LCM = VECCALC };

// Memory that TPipe::InitBuffer gave to a queue or a TBuf.
struct Buffer {
  enum State { kFree, kAllocated, kEnqueued, kDequeued, kAlways };
  static constexpr const char* kNames[] = {"was freed", "", "is in the queue", "", ""};

  uint32_t address, bytes;
  TPosition position;
  State state;
};

template <class T>
class GlobalTensor {
 public:
  void SetGlobalBuffer(__gm__ T* buffer, uint64_t size) { data_ = buffer, size_ = size; }
  void SetGlobalBuffer(__gm__ T* buffer) { data_ = buffer, size_ = 0; }

  GlobalTensor operator[](uint64_t offset) const {
    GlobalTensor tensor = *this;
    tensor.data_ += offset;
    return tensor;
  }

  // By the scalar unit, through its data cache.
  T GetValue(uint64_t offset) const {
    T value;
    emulation::data_caches.load(emulation::core.index, touch(offset, false), sizeof value, &value);
    return value;
  }

  void SetValue(uint64_t offset, T value) {
    emulation::data_caches.store(emulation::core.index, touch(offset, true), sizeof value, &value);
  }

  __gm__ T* GetPhyAddr() const { return data_; }

 private:
  // Its address.
  uintptr_t touch(uint64_t offset, bool write) const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(data_ + offset);
    emulation::core.issue(emulation::kScalar);
    ++emulation::core.counts.scalar_global;
    emulation::memory.touch(emulation::core, address, sizeof(T), write,
                            write ? "SetValue" : "GetValue", true);
    return address;
  }

  __gm__ T* data_ = nullptr;
  uint64_t size_ = 0;
};

// 缓存控制/DataCacheCleanAndInvalid.md: the line at the start of the tensor
enum class CacheLine { SINGLE_CACHE_LINE, ENTIRE_DATA_CACHE };
enum class DcciDst { CACHELINE_ALL, CACHELINE_UB, CACHELINE_OUT, CACHELINE_ATOMIC };
template <class T, CacheLine lines, DcciDst target>
void DataCacheCleanAndInvalid(const GlobalTensor<T>& tensor) {
  static_assert(lines == CacheLine::SINGLE_CACHE_LINE && target == DcciDst::CACHELINE_OUT,
                "the others are not emulated");
  emulation::data_caches.invalidate(emulation::core.index,
                                    reinterpret_cast<uintptr_t>(tensor.GetPhyAddr()));
}

template <class T>
class LocalTensor {
 public:
  LocalTensor() = default;
  LocalTensor(Buffer* buffer, uint32_t address) : buffer_(buffer), address_(address) {}

  LocalTensor operator[](uint32_t offset) const {
    return {buffer_, address_ + offset * (uint32_t)sizeof(T)};
  }

  template <class U>
  LocalTensor<U> ReinterpretCast() const {
    return {buffer_, address_};
  }

  T GetValue(uint32_t index) const {
    T value;
    std::memcpy(&value, scalar(index, false), sizeof value);
    return value;
  }

  void SetValue(uint32_t index, T value) const {
    std::memcpy(const_cast<uint8_t*>(scalar(index, true)), &value, sizeof value);
  }

  __ubuf__ T* GetPhyAddr() const {
    return (__ubuf__ T*)reinterpret_cast<uintptr_t>(emulation::core.memory + address_);
  }

  uint32_t address() const { return address_; }
  TPosition position() const { return buffer_->position; }
  Buffer* buffer() const { return buffer_; }

  // [offset, offset + bytes) from the tensor's start lies in its buffer, and the buffer is the
  // kernel's to use.
  void check(uint32_t offset, uint32_t bytes, const char* what) const {
    using emulation::require;
    require(buffer_, "queue: %s uses a tensor that no queue or buffer gave out", what);
    require(buffer_->state != Buffer::kFree && buffer_->state != Buffer::kEnqueued,
            "queue: %s uses a tensor that %s", what, Buffer::kNames[buffer_->state]);
    require(address_ + offset + bytes <= buffer_->address + buffer_->bytes &&
                address_ >= buffer_->address,
            "bounds: %s goes %d bytes past the end of its buffer", what,
            (int)(address_ + offset + bytes - buffer_->address - buffer_->bytes));
  }

  // 通用说明和约束.md, 通用地址对齐约束
  void check_aligned(const char* what) const {
    emulation::require(address_ % emulation::kBlock == 0,
                       "alignment: %s at %u of the unified buffer, not a multiple of 32", what,
                       address_);
  }

 private:
  const uint8_t* scalar(uint32_t index, bool write) const {
    const char* what = write ? "SetValue" : "GetValue";
    const uint32_t at = address_ + index * sizeof(T);
    check(index * sizeof(T), sizeof(T), what);
    emulation::core.issue(emulation::kScalar);
    ++emulation::core.counts.scalar_local;
    return write ? emulation::core.write(at, sizeof(T), what)
                 : emulation::core.read(at, sizeof(T), what);
  }

  Buffer* buffer_ = nullptr;
  uint32_t address_ = 0;
};

// 工具接口/系统资源与变量/{GetBlockIdx,GetBlockNum}.md
inline int64_t GetBlockIdx() { return emulation::core.index; }
inline int64_t GetBlockNum() { return emulation::block_count; }

}  // namespace AscendC
