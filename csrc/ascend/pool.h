// Pools a window: softmax over its eight rows, per channel. A window lies in two frames: the front
// halves of the four rows of one, and the back halves of the four rows of the next.
#pragma once

#include "../layout.h"
#include "device.h"

namespace dsv4 {

constexpr int kLanes = 64;                        // floats of a repeat
constexpr int kBlockFloats = 8;                   // and of a block of 32 bytes
constexpr int kFrameFloats = kRatio * kRowWidth;  // a frame: the rows of one group of four
constexpr int kRowBlocks = kRowWidth / kBlockFloats;
constexpr int kHeadBlocks = kHeadDim / kBlockFloats;

class Pool {
 public:
  __aicore__ inline void Init(TPipe* pipe) {
    pipe->InitBuffer(buffer_, (kMost + 2 * kEight) * sizeof(float));
    most_ = buffer_.Get<float>();
    weight_ = most_[kMost];
    product_ = weight_[kEight];
  }

  __aicore__ inline void Run(const LocalTensor<float>& pooled, const LocalTensor<float>& previous,
                             const LocalTensor<float>& own) {
    const LocalTensor<float> gate = previous[kKvWidth], own_kv = own[kHeadDim],
                             own_gate = own[kKvWidth + kHeadDim];
    for (int c = 0; c < kHeadDim; c += kLanes)
      Max(most_[c], gate[c], own_gate[c], kLanes, kRatio,
          {1, 1, 1, kHeadBlocks, kRowBlocks, kRowBlocks});
    Max(most_, most_, most_[2 * kHeadDim], 2 * kHeadDim);
    Max(most_, most_, most_[kHeadDim], kHeadDim);

    for (int c = 0; c < kHeadDim; c += kLanes) {
      Sub(weight_[c], gate[c], most_[c], kLanes, kRatio, {1, 1, 1, kHeadBlocks, kRowBlocks, 0});
      Sub(weight_[kFour + c], own_gate[c], most_[c], kLanes, kRatio,
          {1, 1, 1, kHeadBlocks, kRowBlocks, 0});
    }
    Exp(weight_, weight_, kEight);
    for (int c = 0; c < kHeadDim; c += kLanes) {
      Mul(product_[c], weight_[c], previous[c], kLanes, kRatio,
          {1, 1, 1, kHeadBlocks, kHeadBlocks, kRowBlocks});
      Mul(product_[kFour + c], weight_[kFour + c], own_kv[c], kLanes, kRatio,
          {1, 1, 1, kHeadBlocks, kHeadBlocks, kRowBlocks});
    }
    for (int half = kFour; half >= kHeadDim; half /= 2) {
      Add(product_, product_, product_[half], half);
      Add(weight_, weight_, weight_[half], half);
    }
    Div(pooled, product_, weight_, kHeadDim);
  }

 private:
  static constexpr int kFour = kRatio * kHeadDim, kEight = kWindow * kHeadDim, kMost = kFour;

  TBuf<> buffer_;
  LocalTensor<float> most_, weight_, product_;
};

}  // namespace dsv4
