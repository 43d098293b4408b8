// From pooled windows to stored entries, a batch at a time: RMSNorm, RoPE, one rounding to bf16,
// for some formats Hadamard rotation and quantisation, and the write.
//
// The windows are turned, so that a channel of eight windows is one block of 32 bytes ("planes",
// [channels][8]: windows 0-7, and where a batch has sixteen, windows 8-15). What works across
// channels then works on whole blocks: the sum of squares and the largest magnitude are folds, a
// rotated pair is two neighbouring blocks, a Hadamard stage is one add and one subtraction of
// blocks `stride` apart, and a factor per window is a block that repeats with stride 0.
#pragma once

#include "../layout.h"
#include "abi.h"
#include "budget.h"
#include "device.h"
#include "paging.h"
#include "pool.h"
#include "tile.h"

namespace dsv4 {

template <class G, int64_t kFormat>
class Finish {
  static constexpr int kBatch = Budget<G>::kBatch;  // windows
  static constexpr int kPlanes = kBatch / kBlockFloats;
  static constexpr int kPlane = G::kHeadDim * kBlockFloats;  // floats
  static constexpr int kCosSinRow = kRopeDim + kTurned<G> * kBlockFloats;
  static constexpr int kFloatBytes = sizeof(float);
  static constexpr int kPooledBytes = kBatch * kPooledRow<G> * kFloatBytes;
  static constexpr int kCosSinBytes = kBatch * kCosSinRow * kFloatBytes;
  static constexpr int kScratchBytes = Pool<G>::kScratchFloats * kFloatBytes;
  static constexpr int kGammaBytes = kPlane * kFloatBytes;
  static constexpr int kWeightBytes = G::kHeadDim * kFloatBytes;
  static constexpr int kFactorBytes = 3 * kBatch * kFloatBytes;
  static constexpr bool kQuantises = kFormat != kBf16;
  static constexpr int kElementBytes = kQuantises ? 1 : sizeof(bfloat16_t);
  static constexpr int kEntryBytes = G::kHeadDim * kElementBytes;
  static constexpr int kCodeBytes = kBatch * kEntryBytes;
  // Each scale is at the start of a block of its own.
  static constexpr int kScaleBytes = kQuantises ? kBatch * kBlockBytes : 0;
  static constexpr int kOutBytes = kCodeBytes + kScaleBytes;
  // Whether the scratch holds x_ and y_, with what follows them. Else y_ takes the place of the
  // pooled windows, which are turned by then.
  static constexpr bool kBoth =
      2 * kPlanes * kPlane + kBatch * (kRopeDim + G::kHeadDim / 2) <= Pool<G>::kScratchFloats;
  static_assert(kBoth ||
                (!kQuantises && kPlanes * kPlane + kBatch * kRopeDim <= Pool<G>::kScratchFloats));

 public:
  static constexpr int64_t kBytes = kPooledBytes + kCosSinBytes + kScratchBytes + kGammaBytes +
                                    kWeightBytes + kFactorBytes + Budget<G>::kBatches * kOutBytes;

  __aicore__ inline void Init(TPipe* pipe, const RunArguments& a) {
    args_ = a;
    paging_.Init(a.k_page);
    pipe->InitBuffer(pooled_buffer_, kPooledBytes);
    pipe->InitBuffer(cos_sin_buffer_, kCosSinBytes);
    pipe->InitBuffer(scratch_buffer_, kScratchBytes);
    pipe->InitBuffer(gamma_buffer_, kGammaBytes);
    pipe->InitBuffer(weight_buffer_, kWeightBytes);
    pipe->InitBuffer(factor_buffer_, kFactorBytes);
    pipe->InitBuffer(out_, Budget<G>::kBatches, kOutBytes);
    pooled_ = pooled_buffer_.template Get<float>();
    cos_sin_ = cos_sin_buffer_.template Get<float>();
    x_ = scratch_buffer_.template Get<float>();
    y_ = kBoth ? x_[kPlanes * kPlane] : pooled_;
    turned_ = x_[(kBoth ? 2 : 1) * kPlanes * kPlane];
    narrow_ = turned_[kBatch * kRopeDim];
    gamma_ = gamma_buffer_.template Get<float>();
    factor_ = factor_buffer_.template Get<float>();
    constant_ = factor_[kBatch];
    scale_ = constant_[kBatch];
    // A batch may end before it is full; what is not a window yet must be a number.
    Duplicate(pooled_, 0.0f, kBatch * kPooledRow<G>);
    Duplicate(cos_sin_, 0.0f, kBatch * kCosSinRow);
    LoadGamma(pipe);
  }

  // Memory of Pool<G>::kScratchFloats that is free while no batch is finished.
  __aicore__ inline LocalTensor<float> Scratch() const { return x_; }

  // Room for the windows of a tile, once they are pooled.
  __aicore__ inline LocalTensor<float> Pooled() const { return pooled_[windows_ * kPooledRow<G>]; }

  // The tile's windows are pooled.
  __aicore__ inline void Take(const Tile<G>& tile) {
    if (tile.Windows() == 0) return;
    Copy(cos_sin_[windows_ * kCosSinRow], tile.CosSin(0), kRopeDim,
         static_cast<uint8_t>(tile.Windows()),
         {1, 1, kCosSinRow / kBlockFloats, kRopeDim / kBlockFloats});
    for (int f = 0; f < tile.Frames(); ++f)
      if (tile.KSlot(f) >= 0) slots_[windows_++] = tile.KSlot(f);
    if (windows_ + Budget<G>::kFrames > kBatch) Flush();
  }

  __aicore__ inline void Flush() {
    if (windows_ == 0) return;
    planes_ = windows_ > kBlockFloats ? kPlanes : 1;
    // The compiler puts barriers between vector instructions that share tensors; addresses it may
    // not see through.
    AscendC::PipeBarrier<PIPE_V>();
    Turn(x_, pooled_, G::kHeadDim);
    Turn(turned_, cos_sin_, kRopeDim);
    AscendC::PipeBarrier<PIPE_V>();
    Normalise();
    Rotate();
    if constexpr (kQuantises) {
      const LocalTensor<bfloat16_t> rounded = narrow_.template ReinterpretCast<bfloat16_t>();
      Cast(rounded, x_, RoundMode::CAST_RINT, Channels());
      Cast(x_, rounded, RoundMode::CAST_NONE, Channels());
      Hadamard();
    }
    LocalTensor<int8_t> out = out_.template AllocTensor<int8_t>();
    if constexpr (kQuantises)
      Quantise(out);
    else
      Narrow(out.template ReinterpretCast<bfloat16_t>());
    out_.EnQue(out);
    out = out_.template DeQue<int8_t>();
    Store(out);
    out_.FreeTensor(out);
    windows_ = 0;
  }

 private:
  // Floats of the planes in use, and windows.
  __aicore__ inline int Channels() const { return planes_ * kPlane; }
  __aicore__ inline int Windows() const { return planes_ * kBlockFloats; }

  // The RMSNorm weight, each channel filling a block.
  __aicore__ inline void LoadGamma(TPipe* pipe) {
    LocalTensor<float> weight = weight_buffer_.template Get<float>();
    LocalTensor<bfloat16_t> narrow = weight_buffer_.template Get<bfloat16_t>();
    const uint32_t element = args_.norm_weight_is_bf16 ? sizeof(bfloat16_t) : sizeof(float);
    const DataCopyExtParams bytes(1, G::kHeadDim * element, 0, 0, 0);
    if (args_.norm_weight_is_bf16) {
      GlobalTensor<bfloat16_t> gm;
      gm.SetGlobalBuffer((__gm__ bfloat16_t*)args_.norm_weight, G::kHeadDim);
      DataCopyPad(narrow, gm, bytes, DataCopyPadExtParams<bfloat16_t>());
    } else {
      GlobalTensor<float> gm;
      gm.SetGlobalBuffer((__gm__ float*)args_.norm_weight, G::kHeadDim);
      DataCopyPad(weight, gm, bytes, DataCopyPadExtParams<float>());
    }
    Order<HardEvent::MTE2_V>(pipe);
    if (args_.norm_weight_is_bf16) {
      Cast(y_, narrow, RoundMode::CAST_NONE, G::kHeadDim);
      weight = y_;
    }
    Brcb(gamma_, weight, G::kHeadDim / kBlockFloats, {1, kBlockFloats});
  }

  // [batch][width], a block or two apart, to planes [width][8]. Number e of a source's block i goes
  // to block 2 e + i / 8 of the targets: to the other plane, or the other block of channels.
  __aicore__ inline void Turn(const LocalTensor<float>& target, const LocalTensor<float>& source,
                              int width) {
    uint64_t targets[kTurnedBlocks], sources[kTurnedBlocks];
    constexpr int kApart = kTurned<G> * kBlockFloats;
    const int other = kTurned<G> == 1 ? width : kBlockFloats;
    for (int i = 0; i < kTurnedBlocks; ++i) {
      const int window = i % kBatch, block = i / kBatch;
      sources[i] = (uint64_t)source[window * (width + kApart) + block * kBlockFloats].GetPhyAddr();
      targets[i] = (uint64_t)target[(i % 2 * other + i / 2) * kBlockFloats].GetPhyAddr();
    }
    const uint8_t repeats = static_cast<uint8_t>(width / kApart);
    AscendC::TransDataTo5HD<float>(
        targets, sources, AscendC::TransDataTo5HDParams(false, false, repeats, kApart, kTurned<G>));
  }

  // Planes [channels][8] back to [batch][channels].
  __aicore__ inline void TurnBack(const LocalTensor<float>& target,
                                  const LocalTensor<float>& source) {
    uint64_t targets[kTurnedBlocks], sources[kTurnedBlocks];
    AscendC::PipeBarrier<PIPE_V>();  // as in Flush
    for (int plane = 0; plane < planes_; ++plane) {
      for (int i = 0; i < kTurnedBlocks; ++i) {
        sources[i] = (uint64_t)source[plane * kPlane + i * kBlockFloats].GetPhyAddr();
        targets[i] = (uint64_t)target[plane * kPlane + i / 2 * G::kHeadDim + i % 2 * kBlockFloats]
                         .GetPhyAddr();
      }
      AscendC::TransDataTo5HD<float>(
          targets, sources,
          AscendC::TransDataTo5HDParams(false, false, G::kHeadDim / kTurnedBlocks, 2,
                                        kTurnedBlocks));
    }
    AscendC::PipeBarrier<PIPE_V>();
  }

  // Every channel of a window times (or divided by) the window's factor.
  __aicore__ inline void Scale(const LocalTensor<float>& x, bool divide) {
    const BinaryRepeatParams per_window(1, 1, 0, kBlockFloats, kBlockFloats, 0);
    for (int plane = 0; plane < planes_; ++plane) {
      const LocalTensor<float> part = x[plane * kPlane], factor = factor_[plane * kBlockFloats];
      if (divide)
        Div(part, part, factor, kLanes, kPlane / kLanes, per_window);
      else
        Mul(part, part, factor, kLanes, kPlane / kLanes, per_window);
    }
  }

  __aicore__ inline void Normalise() {
    Mul(y_, x_, x_, Channels());
    for (int half = kPlane / 2; half >= kBlockFloats; half /= 2)
      for (int plane = 0; plane < planes_; ++plane) {
        const LocalTensor<float> sum = y_[plane * kPlane];
        Add(Folded(sum, plane, half), sum, sum[half], half);
      }
    Muls(factor_, factor_, 1.0f / G::kHeadDim, Windows());
    Adds(factor_, factor_, args_.eps, Windows());
    Sqrt(factor_, factor_, Windows());  // Rsqrt is an approximation
    Duplicate(constant_, 1.0f, Windows());
    Div(factor_, constant_, factor_, Windows());
    Scale(x_, false);
    for (int plane = 0; plane < planes_; ++plane)
      Mul(x_[plane * kPlane], x_[plane * kPlane], gamma_, kPlane);
  }

  // Where half of what is left of a plane goes: in the end one block, a factor of each window.
  __aicore__ inline LocalTensor<float> Folded(const LocalTensor<float>& part, int plane,
                                              int half) const {
    return half > kBlockFloats ? part : factor_[plane * kBlockFloats];
  }

  // The last 64 channels: a' = a cos - b sin, b' = b cos + a sin, where a and b are neighbouring
  // blocks.
  __aicore__ inline void Rotate() {
    constexpr int kPairs = kRopeDim / 2 * kBlockFloats;  // floats
    constexpr int kRepeats = kPairs / kLanes;
    const BinaryRepeatParams factors(1, 2, 1, 8, 16, 8), sums(2, 1, 1, 16, 8, 8);
    for (int plane = 0; plane < planes_; ++plane) {
      const LocalTensor<float> a = Rotated(plane), b = a[kBlockFloats],
                               cos = turned_[plane * 2 * kPairs], sin = cos[kPairs],
                               products = y_[plane * 4 * kPairs];
      Mul(products, a, cos, kLanes, kRepeats, factors);
      Mul(products[kPairs], b, sin, kLanes, kRepeats, factors);
      Mul(products[2 * kPairs], b, cos, kLanes, kRepeats, factors);
      Mul(products[3 * kPairs], a, sin, kLanes, kRepeats, factors);
    }
    for (int plane = 0; plane < planes_; ++plane) {
      const LocalTensor<float> a = Rotated(plane), b = a[kBlockFloats],
                               products = y_[plane * 4 * kPairs];
      Sub(a, products, products[kPairs], kLanes, kRepeats, sums);
      Add(b, products[2 * kPairs], products[3 * kPairs], kLanes, kRepeats, sums);
    }
  }

  __aicore__ inline LocalTensor<float> Rotated(int plane) const {
    return x_[plane * kPlane + (G::kHeadDim - kRopeDim) * kBlockFloats];
  }

  // The seven stages of the orthonormal Sylvester-Hadamard transform, in the order of
  // ops/reference.py. Both planes are one array of blocks. The result is in x_.
  __aicore__ inline void Hadamard() {
    LocalTensor<float> from = x_, to = y_;
    for (int stride = 1; stride < G::kHeadDim; stride *= 2) {
      // One instruction adds the eight blocks of a repeat to those `stride` further: neighbours
      // where `stride` allows, else one of every 2 * stride.
      const int blocks = planes_ * G::kHeadDim;
      int block = 1, repeat = 2 * stride, repeats = blocks / (2 * stride), first = 8,
          instructions = stride / 8;
      if (stride < 8)
        block = 2 * stride, repeat = 16 * stride, repeats = blocks / (16 * stride), first = 1,
        instructions = stride;
      if (stride == G::kHeadDim / 2)
        repeat = 8, repeats = stride / 8, first = G::kHeadDim, instructions = planes_;
      const uint8_t b = static_cast<uint8_t>(block), r = static_cast<uint8_t>(repeat);
      const BinaryRepeatParams params(b, b, b, r, r, r);
      for (int i = 0; i < instructions; ++i) {
        const int p = i * first * kBlockFloats, q = p + stride * kBlockFloats;
        Add(to[p], from[p], from[q], kLanes, static_cast<uint8_t>(repeats), params);
        Sub(to[q], from[p], from[q], kLanes, static_cast<uint8_t>(repeats), params);
      }
      const LocalTensor<float> swap = from;
      from = to, to = swap;
    }
    constexpr float kOrthonormal = 0.08838834764831845f;  // 128^-1/2
    Muls(x_, from, kOrthonormal, Channels());
  }

  // The largest magnitude of each window, in factor_.
  __aicore__ inline void Amax() {
    Abs(y_, x_, Channels());
    for (int half = kPlane / 2; half >= kBlockFloats; half /= 2)
      for (int plane = 0; plane < planes_; ++plane) {
        const LocalTensor<float> most = y_[plane * kPlane];
        Max(Folded(most, plane, half), most, most[half], half);
      }
  }

  __aicore__ inline void Quantise(const LocalTensor<int8_t>& out) {
    Amax();
    if constexpr (kFormat == kInt8Hadamard) {
      Maxs(factor_, factor_, kAmaxMin, Windows());
      Duplicate(constant_, kInt8Max, Windows());
      Div(scale_, factor_, constant_, Windows());
      Div(factor_, constant_, factor_, Windows());
      Scale(x_, false);
    } else {
      Muls(scale_, factor_, 1.0f / kFp8Max, Windows());
      Maxs(factor_, scale_, 1.1754944e-38f, Windows());  // the least normal: 0 / 0 is no code
      Scale(x_, true);
    }
    TurnBack(y_, x_);
    RoundCodes(out);
    SpreadScales(out[kCodeBytes]);
  }

  __aicore__ inline void Narrow(const LocalTensor<bfloat16_t>& out) {
    TurnBack(y_, x_);
    Cast(out, y_, RoundMode::CAST_RINT, Channels());
  }

  // From y_.
  __aicore__ inline void RoundCodes(const LocalTensor<int8_t>& codes) {
    if constexpr (kFormat == kInt8Hadamard) {
      // By way of int16, which is exact: float to half and half to int8 would round twice.
      const LocalTensor<int16_t> integer = narrow_.template ReinterpretCast<int16_t>();
      const LocalTensor<half> narrow = x_.template ReinterpretCast<half>();
      Cast(integer, y_, RoundMode::CAST_RINT, Channels());
      Cast(narrow, integer, RoundMode::CAST_RINT, Channels());
      Cast(codes, narrow, RoundMode::CAST_RINT, Channels());
    } else {
      Cast(codes.template ReinterpretCast<fp8_e4m3fn_t>(), y_, RoundMode::CAST_RINT, Channels());
    }
  }

  __aicore__ inline void SpreadScales(const LocalTensor<int8_t>& scales) {
    if (kFormat == kInt8Hadamard && args_.k_scale_is_fp16) {
      const LocalTensor<half> narrow = constant_.template ReinterpretCast<half>();
      Cast(narrow, scale_, RoundMode::CAST_RINT, Windows());
      Brcb(scales.template ReinterpretCast<half>(), narrow, planes_, {1, kBlockFloats});
    } else {
      Brcb(scales.template ReinterpretCast<float>(), scale_, planes_, {1, kBlockFloats});
    }
  }

  // Windows whose entries are neighbours in one page go out together.
  __aicore__ inline void Store(const LocalTensor<int8_t>& out) {
    for (int first = 0; first < windows_;) {
      int end = first + 1;
      while (end < windows_ && slots_[end] == slots_[end - 1] + 1 &&
             paging_.InPage(slots_[end]) != 0)
        ++end;
      StoreRun(out, first, end - first);
      first = end;
    }
  }

  __aicore__ inline void StoreRun(const LocalTensor<int8_t>& out, int first, int count) {
    const int64_t page = paging_.Page(slots_[first]), entry = paging_.InPage(slots_[first]);
    const uint16_t n = static_cast<uint16_t>(count);
    const int64_t at = page * args_.k_page_stride + entry * args_.k_entry_stride;
    GlobalTensor<int8_t> codes_gm;
    codes_gm.SetGlobalBuffer((__gm__ int8_t*)(args_.k_cache + at * kElementBytes));
    const uint32_t gap =
        static_cast<uint32_t>((args_.k_entry_stride - G::kHeadDim) * kElementBytes);
    DataCopyPad(codes_gm, out[first * kEntryBytes], DataCopyExtParams(n, kEntryBytes, 0, gap, 0));
    if constexpr (kQuantises) StoreScales(out[kCodeBytes + first * kBlockBytes], page, entry, n);
  }

  __aicore__ inline void StoreScales(const LocalTensor<int8_t>& scales, int64_t page, int64_t entry,
                                     uint16_t n) {
    if constexpr (kFormat == kFp8Amax) {
      const uint64_t page_scales =
          args_.k_cache + page * args_.k_page_stride + args_.k_page * G::kHeadDim;
      StoreScalesAt<float>(scales, page_scales + entry * sizeof(float), n, 1);
    } else {
      const int64_t at = page * args_.k_scale_page_stride + entry * args_.k_scale_entry_stride;
      if (args_.k_scale_is_fp16)
        StoreScalesAt<half>(scales, args_.k_scale + at * sizeof(half), n,
                            args_.k_scale_entry_stride);
      else
        StoreScalesAt<float>(scales, args_.k_scale + at * sizeof(float), n,
                             args_.k_scale_entry_stride);
    }
  }

  template <class T>
  __aicore__ inline void StoreScalesAt(const LocalTensor<int8_t>& scales, uint64_t address,
                                       uint16_t n, int64_t stride) {
    GlobalTensor<T> gm;
    gm.SetGlobalBuffer((__gm__ T*)address);
    const uint32_t gap = static_cast<uint32_t>((stride - 1) * sizeof(T));
    DataCopyPad(gm, scales.template ReinterpretCast<T>(),
                DataCopyExtParams(n, sizeof(T), 0, gap, 0));
  }

  RunArguments args_;
  Paging paging_;
  int windows_ = 0;  // pooled, and not finished yet
  int planes_;       // that they fill
  int64_t slots_[kBatch];
  TBuf<> pooled_buffer_, cos_sin_buffer_, scratch_buffer_, gamma_buffer_, factor_buffer_;
  TBuf<TPosition::VECIN> weight_buffer_;
  TQue<TPosition::VECOUT, 1> out_;
  LocalTensor<float> pooled_, cos_sin_, x_, y_, turned_, narrow_, gamma_, factor_, constant_,
      scale_;
};

}  // namespace dsv4
