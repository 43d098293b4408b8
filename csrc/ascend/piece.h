// A piece of a plan's sections in the unified buffer: those of up to kPiece tokens, and of the few
// before them.
#pragma once

#include "device.h"
#include "sections.h"

namespace dsv4 {

constexpr int64_t kPiece = 256;
constexpr int64_t kBefore = 8;  // the seven that a window may look back to, and one for alignment

class Piece {
 public:
  __aicore__ inline void Init(TPipe* pipe) {
    pipe->InitBuffer(buffer_, kSections * kRoom * sizeof(int64_t));
    sections_ = buffer_.Get<int64_t>();
  }

  // The piece is now that of tokens [first, first + count), with nothing in it. `first` is a
  // multiple of four.
  __aicore__ inline void Begin(int64_t first, int64_t count) { first_ = first, count_ = count; }

  __aicore__ inline int64_t First() const { return first_; }
  __aicore__ inline int64_t End() const { return first_ + count_; }
  __aicore__ inline int64_t Earliest() const { return first_ < kBefore ? 0 : first_ - kBefore; }

  __aicore__ inline int64_t Get(Section section, int64_t token) const {
    return sections_.GetValue(Place(section, token));
  }
  __aicore__ inline void Set(Section section, int64_t token, int64_t value) const {
    sections_.SetValue(Place(section, token), value);
  }
  __aicore__ inline LocalTensor<int64_t> At(Section section, int64_t token) const {
    return sections_[Place(section, token)];
  }

  // Copies the sections of the piece's own tokens to those of a plan of `tokens`.
  __aicore__ inline void Store(const GlobalTensor<int64_t>& sections, int64_t tokens) const {
    const uint32_t bytes = static_cast<uint32_t>(count_ * sizeof(int64_t));
    const uint32_t gap = kRoom * sizeof(int64_t) / kBlockBytes - Blocks(bytes);
    const uint32_t rest = static_cast<uint32_t>((tokens - count_) * sizeof(int64_t));
    const DataCopyExtParams params(kSections, bytes, gap, rest, 0);
    DataCopyPad(sections[first_], At(kPositions, first_), params);
  }

 private:
  static constexpr int64_t kRoom = kBefore + kPiece;

  __aicore__ inline int64_t Place(Section section, int64_t token) const {
    return section * kRoom + kBefore + token - first_;
  }

  int64_t first_ = 0, count_ = 0;
  TBuf<TPosition::VECOUT> buffer_;
  LocalTensor<int64_t> sections_;
};

}  // namespace dsv4
