// Pools windows: softmax over the eight rows of each, per channel. A window lies in two frames: the
// front halves of the four rows of one, and the back halves of the four rows of the next.
//
// A vector instruction that needs what an earlier one makes waits for it. So all windows of a tile
// go through each step together: what is between two frames and a result is
// [rows][windows][channels], and most steps are one instruction.
#pragma once

#include "../layout.h"
#include "budget.h"
#include "device.h"

namespace dsv4 {

constexpr int kLanes = 64;       // floats of a repeat
constexpr int kBlockFloats = 8;  // and of a block of 32 bytes

// A frame: the rows of one group of four.
template <class G>
constexpr int kFrameFloats = kRatio * G::kRowWidth;

// Blocks that one instruction turns (finish.h): one of each of sixteen windows, or two of eight.
constexpr int kTurnedBlocks = AscendC::NCHW_CONV_ADDR_LIST_SIZE;
template <class G>
constexpr int kTurned = kTurnedBlocks / Budget<G>::kBatch;
// A pooled window, and as many blocks more: so the sixteen are in as many groups of banks.
template <class G>
constexpr int kPooledRow = G::kHeadDim + kTurned<G> * kBlockFloats;

// Where the front halves of a window's first four rows are. They may be the tile's frame before the
// window's own; where a tile has but one frame they never are, and take no more room than they
// need.
template <class G>
struct Previous {
  static constexpr bool kCarried = Budget<G>::kFrames == 1;
  static constexpr int kRow = kCarried ? 2 * G::kHeadDim : G::kRowWidth;  // floats from row to row
  static constexpr int kGate = kCarried ? G::kHeadDim : G::kKvWidth;      // and from kv to gate
};

template <class G>
class Pool {
 public:
  static constexpr int kScratchFloats = Budget<G>::kFrames * (kWindow + kRatio) * G::kHeadDim;

  __aicore__ inline void Init(const LocalTensor<float>& scratch) {
    weight_ = scratch;
    sum_ = scratch[Budget<G>::kFrames * kWindow * G::kHeadDim];
  }

  __aicore__ inline void Take(const LocalTensor<float>& previous, const LocalTensor<float>& own) {
    previous_[windows_] = previous;
    own_[windows_++] = own[G::kHeadDim];
  }

  // Pools the windows that were taken, to [windows][kPooledRow].
  __aicore__ inline void PoolTo(const LocalTensor<float>& pooled) {
    if (windows_ == 0) return;
    row_ = windows_ * G::kHeadDim;
    FindMost();
    Weigh();
    Sum();
    constexpr uint8_t kFrom = G::kHeadDim / kBlockFloats, kTo = kPooledRow<G> / kBlockFloats;
    for (int c = 0; c < G::kHeadDim; c += kLanes)
      Div(pooled[c], weight_[c], sum_[c], kLanes, static_cast<uint8_t>(windows_),
          {1, 1, 1, kTo, kFrom, kFrom});
    windows_ = 0;
  }

 private:
  // One instruction takes 64 channels of four rows. The next repeat is at most 255 blocks further:
  // where rows are longer, it takes all channels of a row.
  static constexpr bool kByRow = G::kRowWidth / kBlockFloats > 255;
  static constexpr int kParts = kByRow ? kRatio : G::kHeadDim / kLanes;
  static constexpr uint8_t kRepeats = kByRow ? G::kHeadDim / kLanes : kRatio;

  // Of four rows that are so many floats apart: where a part begins, and how many blocks further
  // its next repeat is.
  __aicore__ inline static int Begin(int part, int row) { return part * (kByRow ? row : kLanes); }
  __aicore__ inline static uint8_t Step(int row) {
    return static_cast<uint8_t>((kByRow ? kLanes : row) / kBlockFloats);
  }

  // Each channel's largest gate, in sum_.
  __aicore__ inline void FindMost() {
    const BinaryRepeatParams params(1, 1, 1, Step(row_), Step(kPreviousRow), Step(kOwnRow));
    for (int w = 0; w < windows_; ++w)
      for (int part = 0; part < kParts; ++part)
        Max(sum_[At(w, part)], PreviousGate(w, part), OwnGate(w, part), kLanes, kRepeats, params);
    Max(sum_, sum_, sum_[2 * row_], 2 * row_);
    Max(sum_, sum_, sum_[row_], row_);
  }

  __aicore__ inline void Weigh() {
    const BinaryRepeatParams previous(1, 1, 1, Step(row_), Step(kPreviousRow), Step(0)),
        own(1, 1, 1, Step(row_), Step(kOwnRow), Step(0));
    for (int w = 0; w < windows_; ++w)
      for (int part = 0; part < kParts; ++part) {
        const LocalTensor<float> most = sum_[w * G::kHeadDim + Begin(part, 0)];
        const int at = At(w, part);
        Sub(weight_[at], PreviousGate(w, part), most, kLanes, kRepeats, previous);
        Sub(weight_[Own() + at], OwnGate(w, part), most, kLanes, kRepeats, own);
      }
    Exp(weight_, weight_, 2 * Own());
  }

  // The rows' weights, in sum_, and what they weigh, in weight_.
  __aicore__ inline void Sum() {
    const BinaryRepeatParams previous(1, 1, 1, Step(row_), Step(row_), Step(kPreviousRow)),
        own(1, 1, 1, Step(row_), Step(row_), Step(kOwnRow));
    Add(sum_, weight_, weight_[Own()], Own());
    for (int w = 0; w < windows_; ++w)
      for (int part = 0; part < kParts; ++part) {
        const LocalTensor<float> of_previous = weight_[At(w, part)], of_own = of_previous[Own()];
        Mul(of_previous, of_previous, previous_[w][Begin(part, kPreviousRow)], kLanes, kRepeats,
            previous);
        Mul(of_own, of_own, own_[w][Begin(part, kOwnRow)], kLanes, kRepeats, own);
      }
    Add(weight_, weight_, weight_[Own()], Own());
    for (int half = 2 * row_; half >= row_; half /= 2) {
      Add(sum_, sum_, sum_[half], half);
      Add(weight_, weight_, weight_[half], half);
    }
  }

  // Where a part of a window is in [rows][windows][channels].
  __aicore__ inline int At(int w, int part) const { return w * G::kHeadDim + Begin(part, row_); }
  __aicore__ inline LocalTensor<float> PreviousGate(int w, int part) const {
    return previous_[w][Previous<G>::kGate + Begin(part, kPreviousRow)];
  }
  __aicore__ inline LocalTensor<float> OwnGate(int w, int part) const {
    return own_[w][G::kKvWidth + Begin(part, kOwnRow)];
  }
  // Where the rows of the windows' own frames begin.
  __aicore__ inline int Own() const { return kRatio * row_; }

  static constexpr int kPreviousRow = Previous<G>::kRow, kOwnRow = G::kRowWidth;

  int windows_ = 0;  // taken, and not pooled yet
  int row_;          // floats of a row of them all
  // The halves that are pooled.
  LocalTensor<float> previous_[Budget<G>::kFrames], own_[Budget<G>::kFrames];
  LocalTensor<float> weight_, sum_;
};

}  // namespace dsv4
