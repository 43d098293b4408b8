// Pools windows: softmax over the eight rows of each, per channel. A window lies in two frames: the
// front halves of the four rows of one, and the back halves of the four rows of the next.
//
// A vector instruction that needs what an earlier one makes waits for it. So all windows of a tile
// go through each step together: what is between two frames and a result is [rows][windows][128],
// and most steps are one instruction.
#pragma once

#include "../layout.h"
#include "device.h"

namespace dsv4 {

constexpr int kLanes = 64;                        // floats of a repeat
constexpr int kBlockFloats = 8;                   // and of a block of 32 bytes
constexpr int kFrameFloats = kRatio * kRowWidth;  // a frame: the rows of one group of four
constexpr int kRowBlocks = kRowWidth / kBlockFloats;
constexpr int kHeadBlocks = kHeadDim / kBlockFloats;
// A pooled window, and a block: so a channel's sixteen blocks (finish.h) are in as many groups of
// banks.
constexpr int kPooledBlocks = kHeadBlocks + 1;
constexpr int kMostFrames = 4;  // of a tile: as many windows at most

class Pool {
 public:
  static constexpr int kScratchFloats = kMostFrames * (kWindow + kRatio) * kHeadDim;

  __aicore__ inline void Init(const LocalTensor<float>& scratch) {
    weight_ = scratch;
    sum_ = scratch[kMostFrames * kWindow * kHeadDim];
  }

  __aicore__ inline void Take(const LocalTensor<float>& previous, const LocalTensor<float>& own) {
    previous_[windows_] = previous;
    own_[windows_++] = own[kHeadDim];
  }

  // Pools the windows that were taken, to [windows][136].
  __aicore__ inline void Run(const LocalTensor<float>& pooled) {
    if (windows_ == 0) return;
    row_ = windows_ * kHeadDim;
    FindMost();
    Weigh();
    Sum();
    for (int c = 0; c < kHeadDim; c += kLanes)
      Div(pooled[c], weight_[c], sum_[c], kLanes, static_cast<uint8_t>(windows_),
          {1, 1, 1, kPooledBlocks, kHeadBlocks, kHeadBlocks});
    windows_ = 0;
  }

 private:
  // Each channel's largest gate, in sum_.
  __aicore__ inline void FindMost() {
    for (int w = 0; w < windows_; ++w)
      for (int c = 0; c < kHeadDim; c += kLanes)
        Max(sum_[w * kHeadDim + c], Gate(previous_[w])[c], Gate(own_[w])[c], kLanes, kRatio,
            {1, 1, 1, RowBlocks(), kRowBlocks, kRowBlocks});
    Max(sum_, sum_, sum_[2 * row_], 2 * row_);
    Max(sum_, sum_, sum_[row_], row_);
  }

  __aicore__ inline void Weigh() {
    const BinaryRepeatParams params(1, 1, 1, RowBlocks(), kRowBlocks, 0);
    for (int w = 0; w < windows_; ++w)
      for (int c = 0; c < kHeadDim; c += kLanes) {
        const int at = w * kHeadDim + c;
        Sub(weight_[at], Gate(previous_[w])[c], sum_[at], kLanes, kRatio, params);
        Sub(weight_[Own() + at], Gate(own_[w])[c], sum_[at], kLanes, kRatio, params);
      }
    Exp(weight_, weight_, 2 * Own());
  }

  // The rows' weights, in sum_, and what they weigh, in weight_.
  __aicore__ inline void Sum() {
    const BinaryRepeatParams params(1, 1, 1, RowBlocks(), RowBlocks(), kRowBlocks);
    Add(sum_, weight_, weight_[Own()], Own());
    for (int w = 0; w < windows_; ++w)
      for (int c = 0; c < kHeadDim; c += kLanes) {
        const int at = w * kHeadDim + c, own = Own() + at;
        Mul(weight_[at], weight_[at], previous_[w][c], kLanes, kRatio, params);
        Mul(weight_[own], weight_[own], own_[w][c], kLanes, kRatio, params);
      }
    Add(weight_, weight_, weight_[Own()], Own());
    for (int half = 2 * row_; half >= row_; half /= 2) {
      Add(sum_, sum_, sum_[half], half);
      Add(weight_, weight_, weight_[half], half);
    }
  }

  __aicore__ inline LocalTensor<float> Gate(const LocalTensor<float>& half) const {
    return half[kKvWidth];
  }
  // Where the rows of the windows' own frames begin.
  __aicore__ inline int Own() const { return kRatio * row_; }
  __aicore__ inline uint8_t RowBlocks() const { return static_cast<uint8_t>(row_ / kBlockFloats); }

  int windows_ = 0;                                              // taken, and not pooled yet
  int row_;                                                      // floats of a row of them all
  LocalTensor<float> previous_[kMostFrames], own_[kMostFrames];  // the halves that are pooled
  LocalTensor<float> weight_, sum_;
};

}  // namespace dsv4
