// From pooled windows to stored entries, sixteen at a time: RMSNorm, RoPE, one rounding to bf16, Hadamard rotation,
// quantisation, and the write.
//
// The sixteen windows are turned, so that a channel of eight windows is one block of 32 bytes ("planes": windows 0-7 and
// 8-15, [2][128][8]). What works across channels then works on whole blocks: the sum of squares and the largest magnitude
// are folds, a rotated pair is two neighbouring blocks, a Hadamard stage is one add and one subtraction of blocks `stride`
// apart, and a factor per window is a block that repeats with stride 0.
#pragma once

#include "kernel_operator.h"

#include "../layout.h"
#include "abi.h"
#include "pool.h"

namespace dsv4 {

constexpr int kBatch = 16;                                // windows
constexpr int kPlanes = 2;
constexpr int kPlane = kHeadDim * kBlockFloats;           // floats
constexpr int kBatchFloats = kBatch * kHeadDim;

template <int64_t kFormat>
class Finish {
 public:
  __aicore__ inline void Init(AscendC::TPipe* pipe, const Arguments& a) {
    args_ = a;
    pipe->InitBuffer(pooled_buffer_, kBatchFloats * sizeof(float));
    pipe->InitBuffer(x_buffer_, kBatchFloats * sizeof(float));
    pipe->InitBuffer(y_buffer_, kBatchFloats * sizeof(float));
    pipe->InitBuffer(narrow_buffer_, kBatchFloats * sizeof(half));
    pipe->InitBuffer(cos_sin_buffer_, kBatch * kRopeDim * sizeof(float));
    pipe->InitBuffer(turned_buffer_, kBatch * kRopeDim * sizeof(float));
    pipe->InitBuffer(gamma_buffer_, kPlane * sizeof(float));
    pipe->InitBuffer(weight_buffer_, kHeadDim * sizeof(float));
    pipe->InitBuffer(factor_buffer_, 3 * kBatch * sizeof(float));
    pipe->InitBuffer(out_, 2, kCodeBytes + kScaleBytes);
    pooled_ = pooled_buffer_.template Get<float>();
    x_ = x_buffer_.template Get<float>();
    y_ = y_buffer_.template Get<float>();
    cos_sin_ = cos_sin_buffer_.template Get<float>();
    turned_ = turned_buffer_.template Get<float>();
    gamma_ = gamma_buffer_.template Get<float>();
    factor_ = factor_buffer_.template Get<float>();
    constant_ = factor_[kBatch];
    scale_ = constant_[kBatch];
    // A batch may end before it is full; what is not a window yet must be a number.
    AscendC::Duplicate(pooled_, 0.0f, kBatchFloats);
    AscendC::Duplicate(cos_sin_, 0.0f, kBatch * kRopeDim);
    LoadGamma(pipe);
  }

  // Room for the next window, in which the caller puts its pooled channels and its row of the table.
  __aicore__ inline AscendC::LocalTensor<float> Pooled() { return pooled_[windows_ * kHeadDim]; }
  __aicore__ inline AscendC::LocalTensor<float> CosSin() { return cos_sin_[windows_ * kRopeDim]; }

  // The window is complete; its entry goes to `slot`.
  __aicore__ inline void Add(int64_t slot) {
    slots_[windows_++] = slot;
    if (windows_ == kBatch) Flush();
  }

  __aicore__ inline void Flush() {
    if (windows_ == 0) return;
    Turn(x_, pooled_, kHeadDim);
    Turn(turned_, cos_sin_, kRopeDim);
    Normalise();
    Rotate();
    AscendC::LocalTensor<bfloat16_t> rounded = narrow_buffer_.template Get<bfloat16_t>();
    AscendC::Cast(rounded, x_, AscendC::RoundMode::CAST_RINT, kBatchFloats);
    AscendC::Cast(x_, rounded, AscendC::RoundMode::CAST_NONE, kBatchFloats);
    Hadamard();
    AscendC::LocalTensor<int8_t> out = out_.template AllocTensor<int8_t>();
    Quantise(out);
    out_.EnQue(out);
    out = out_.template DeQue<int8_t>();
    Store(out);
    out_.FreeTensor(out);
    windows_ = 0;
  }

 private:
  static constexpr int kCodeBytes = kBatch * kHeadDim;
  static constexpr int kBlockBytes = 32;
  static constexpr int kScaleBytes = kBatch * kBlockBytes;  // each scale at the start of a block of its own

  // The RMSNorm weight, each channel filling a block.
  __aicore__ inline void LoadGamma(AscendC::TPipe* pipe) {
    AscendC::LocalTensor<float> weight = weight_buffer_.template Get<float>();
    AscendC::LocalTensor<bfloat16_t> narrow = weight_buffer_.template Get<bfloat16_t>();
    const AscendC::DataCopyExtParams bytes(1, kHeadDim * (args_.norm_weight_is_bf16 ? sizeof(bfloat16_t) : sizeof(float)), 0, 0, 0);
    if (args_.norm_weight_is_bf16) {
      AscendC::GlobalTensor<bfloat16_t> gm;
      gm.SetGlobalBuffer((__gm__ bfloat16_t*)args_.norm_weight, kHeadDim);
      AscendC::DataCopyPad(narrow, gm, bytes, AscendC::DataCopyPadExtParams<bfloat16_t>());
    } else {
      AscendC::GlobalTensor<float> gm;
      gm.SetGlobalBuffer((__gm__ float*)args_.norm_weight, kHeadDim);
      AscendC::DataCopyPad(weight, gm, bytes, AscendC::DataCopyPadExtParams<float>());
    }
    const AscendC::TEventID loaded = pipe->FetchEventID<AscendC::HardEvent::MTE2_V>();
    AscendC::SetFlag<AscendC::HardEvent::MTE2_V>(loaded);
    AscendC::WaitFlag<AscendC::HardEvent::MTE2_V>(loaded);
    if (args_.norm_weight_is_bf16) {
      AscendC::Cast(y_, narrow, AscendC::RoundMode::CAST_NONE, kHeadDim);
      weight = y_;
    }
    AscendC::Brcb(gamma_, weight, kHeadDim / kBlockFloats, {1, kBlockFloats});
  }

  // [16][width] to planes [2][width][8].
  __aicore__ inline void Turn(const AscendC::LocalTensor<float>& target, const AscendC::LocalTensor<float>& source, int width) {
    uint64_t targets[AscendC::NCHW_CONV_ADDR_LIST_SIZE], sources[AscendC::NCHW_CONV_ADDR_LIST_SIZE];
    for (int i = 0; i < kBatch; ++i) {
      sources[i] = (uint64_t)source[i * width].GetPhyAddr();
      targets[i] = (uint64_t)target[(i % kPlanes * width + i / kPlanes) * kBlockFloats].GetPhyAddr();
    }
    const uint8_t repeats = static_cast<uint8_t>(width / kBlockFloats);
    AscendC::TransDataTo5HD<float>(targets, sources, AscendC::TransDataTo5HDParams(false, false, repeats, kBlockFloats, 1));
  }

  // Planes [2][128][8] back to [16][128].
  __aicore__ inline void TurnBack(const AscendC::LocalTensor<float>& target, const AscendC::LocalTensor<float>& source) {
    uint64_t targets[AscendC::NCHW_CONV_ADDR_LIST_SIZE], sources[AscendC::NCHW_CONV_ADDR_LIST_SIZE];
    for (int plane = 0; plane < kPlanes; ++plane) {
      for (int i = 0; i < kBatch; ++i) {
        sources[i] = (uint64_t)source[plane * kPlane + i * kBlockFloats].GetPhyAddr();
        targets[i] = (uint64_t)target[plane * kPlane + i / 2 * kHeadDim + i % 2 * kBlockFloats].GetPhyAddr();
      }
      AscendC::TransDataTo5HD<float>(targets, sources, AscendC::TransDataTo5HDParams(false, false, kHeadDim / kBatch, 2, kBatch));
    }
  }

  // Every channel of a window times (or divided by) the window's factor.
  __aicore__ inline void Scale(const AscendC::LocalTensor<float>& x, bool divide) {
    const AscendC::BinaryRepeatParams per_window(1, 1, 0, kBlockFloats, kBlockFloats, 0);
    for (int plane = 0; plane < kPlanes; ++plane) {
      const AscendC::LocalTensor<float> part = x[plane * kPlane], factor = factor_[plane * kBlockFloats];
      if (divide)
        AscendC::Div(part, part, factor, kLanes, kPlane / kLanes, per_window);
      else
        AscendC::Mul(part, part, factor, kLanes, kPlane / kLanes, per_window);
    }
  }

  __aicore__ inline void Normalise() {
    AscendC::Mul(y_, x_, x_, kBatchFloats);
    for (int plane = 0; plane < kPlanes; ++plane) {
      const AscendC::LocalTensor<float> sum = y_[plane * kPlane];
      for (int half = kPlane / 2; half > kBlockFloats; half /= 2) AscendC::Add(sum, sum, sum[half], half);
      AscendC::Add(factor_[plane * kBlockFloats], sum, sum[kBlockFloats], kBlockFloats);
    }
    AscendC::Muls(factor_, factor_, 1.0f / kHeadDim, kBatch);
    AscendC::Adds(factor_, factor_, args_.eps, kBatch);
    AscendC::Sqrt(factor_, factor_, kBatch);  // Rsqrt is an approximation
    AscendC::Duplicate(constant_, 1.0f, kBatch);
    AscendC::Div(factor_, constant_, factor_, kBatch);
    Scale(x_, false);
    for (int plane = 0; plane < kPlanes; ++plane)
      AscendC::Mul(x_[plane * kPlane], x_[plane * kPlane], gamma_, kPlane);
  }

  // The last 64 channels: a' = a cos - b sin, b' = b cos + a sin, where a and b are neighbouring blocks.
  __aicore__ inline void Rotate() {
    constexpr int kPairs = kRopeDim / 2 * kBlockFloats;  // floats
    constexpr int kRepeats = kPairs / kLanes;
    for (int plane = 0; plane < kPlanes; ++plane) {
      const AscendC::LocalTensor<float> a = x_[plane * kPlane + (kHeadDim - kRopeDim) * kBlockFloats], b = a[kBlockFloats];
      const AscendC::LocalTensor<float> cos = turned_[plane * 2 * kPairs], sin = cos[kPairs];
      const AscendC::LocalTensor<float> a_cos = y_, b_sin = y_[kPairs], b_cos = y_[2 * kPairs], a_sin = y_[3 * kPairs];
      const AscendC::BinaryRepeatParams factors(1, 2, 1, 8, 16, 8), sums(2, 1, 1, 16, 8, 8);
      AscendC::Mul(a_cos, a, cos, kLanes, kRepeats, factors);
      AscendC::Mul(b_sin, b, sin, kLanes, kRepeats, factors);
      AscendC::Mul(b_cos, b, cos, kLanes, kRepeats, factors);
      AscendC::Mul(a_sin, a, sin, kLanes, kRepeats, factors);
      AscendC::Sub(a, a_cos, b_sin, kLanes, kRepeats, sums);
      AscendC::Add(b, b_cos, a_sin, kLanes, kRepeats, sums);
    }
  }

  // The seven stages of the orthonormal Sylvester-Hadamard transform, in the order of ops/reference.py. Both planes
  // are one array of 256 blocks. The result is in x_.
  __aicore__ inline void Hadamard() {
    AscendC::LocalTensor<float> from = x_, to = y_;
    for (int stride = 1; stride < kHeadDim; stride *= 2) {
      // One instruction adds the eight blocks of a repeat to those `stride` further: neighbours where `stride` allows,
      // else one of every 2 * stride.
      const int blocks = kPlanes * kHeadDim;
      int block = 1, repeat = 2 * stride, repeats = blocks / (2 * stride), first = 8, instructions = stride / 8;
      if (stride < 8) block = 2 * stride, repeat = 16 * stride, repeats = 16 / stride, first = 1, instructions = stride;
      if (stride == kHeadDim / 2) repeat = 8, repeats = stride / 8, first = kHeadDim, instructions = kPlanes;
      const uint8_t b = static_cast<uint8_t>(block), r = static_cast<uint8_t>(repeat);
      const AscendC::BinaryRepeatParams params(b, b, b, r, r, r);
      for (int i = 0; i < instructions; ++i) {
        const int p = i * first * kBlockFloats, q = p + stride * kBlockFloats;
        AscendC::Add(to[p], from[p], from[q], kLanes, static_cast<uint8_t>(repeats), params);
        AscendC::Sub(to[q], from[p], from[q], kLanes, static_cast<uint8_t>(repeats), params);
      }
      const AscendC::LocalTensor<float> swap = from;
      from = to, to = swap;
    }
    constexpr float kOrthonormal = 0.08838834764831845f;  // 128^-1/2
    AscendC::Muls(x_, from, kOrthonormal, kBatchFloats);
  }

  // The largest magnitude of each window, in factor_.
  __aicore__ inline void Amax() {
    AscendC::Abs(y_, x_, kBatchFloats);
    for (int plane = 0; plane < kPlanes; ++plane) {
      const AscendC::LocalTensor<float> most = y_[plane * kPlane];
      for (int half = kPlane / 2; half > kBlockFloats; half /= 2) AscendC::Max(most, most, most[half], half);
      AscendC::Max(factor_[plane * kBlockFloats], most, most[kBlockFloats], kBlockFloats);
    }
  }

  __aicore__ inline void Quantise(const AscendC::LocalTensor<int8_t>& out) {
    Amax();
    if constexpr (kFormat == kInt8Hadamard) {
      AscendC::Maxs(factor_, factor_, kAmaxFloor, kBatch);
      AscendC::Duplicate(constant_, kInt8Max, kBatch);
      AscendC::Div(scale_, factor_, constant_, kBatch);
      AscendC::Div(factor_, constant_, factor_, kBatch);
      Scale(x_, false);
    } else {
      AscendC::Muls(scale_, factor_, 1.0f / kFp8Max, kBatch);
      AscendC::Maxs(factor_, scale_, 1.1754944e-38f, kBatch);  // the least normal number: 0 / 0 is no code
      Scale(x_, true);
    }
    TurnBack(pooled_, x_);
    if constexpr (kFormat == kInt8Hadamard) {
      // By way of int16, which is exact: float to half and half to int8 would round twice.
      AscendC::LocalTensor<int16_t> integer = narrow_buffer_.template Get<int16_t>();
      AscendC::LocalTensor<half> narrow = y_.template ReinterpretCast<half>();
      AscendC::Cast(integer, pooled_, AscendC::RoundMode::CAST_RINT, kBatchFloats);
      AscendC::Cast(narrow, integer, AscendC::RoundMode::CAST_RINT, kBatchFloats);
      AscendC::Cast(out, narrow, AscendC::RoundMode::CAST_RINT, kBatchFloats);
    } else {
      AscendC::Cast(out.template ReinterpretCast<fp8_e4m3fn_t>(), pooled_, AscendC::RoundMode::CAST_RINT, kBatchFloats);
    }
    if (kFormat == kInt8Hadamard && args_.k_scale_is_fp16) {
      AscendC::LocalTensor<half> narrow = narrow_buffer_.template Get<half>();
      AscendC::Cast(narrow, scale_, AscendC::RoundMode::CAST_RINT, kBatch);
      AscendC::Brcb(out[kCodeBytes].template ReinterpretCast<half>(), narrow, kPlanes, {1, kBlockFloats});
    } else {
      AscendC::Brcb(out[kCodeBytes].template ReinterpretCast<float>(), scale_, kPlanes, {1, kBlockFloats});
    }
  }

  // Windows whose entries are neighbours in one page go out together.
  __aicore__ inline void Store(const AscendC::LocalTensor<int8_t>& out) {
    for (int first = 0; first < windows_;) {
      int end = first + 1;
      while (end < windows_ && slots_[end] == slots_[end - 1] + 1 && slots_[end] % args_.k_page != 0) ++end;
      StoreRun(out, first, end - first);
      first = end;
    }
  }

  __aicore__ inline void StoreRun(const AscendC::LocalTensor<int8_t>& out, int first, int count) {
    const int64_t page = slots_[first] / args_.k_page, entry = slots_[first] % args_.k_page;
    const uint16_t n = static_cast<uint16_t>(count);
    const uint64_t codes = args_.k_cache + page * args_.k_page_stride + entry * args_.k_entry_stride;
    AscendC::GlobalTensor<int8_t> codes_gm;
    codes_gm.SetGlobalBuffer((__gm__ int8_t*)codes);
    const uint32_t gap = static_cast<uint32_t>(args_.k_entry_stride - kHeadDim);
    AscendC::DataCopyPad(codes_gm, out[first * kHeadDim], AscendC::DataCopyExtParams(n, kHeadDim, 0, gap, 0));

    const AscendC::LocalTensor<int8_t> scales = out[kCodeBytes + first * kBlockBytes];
    if constexpr (kFormat == kFp8Amax) {
      const uint64_t page_scales = args_.k_cache + page * args_.k_page_stride + args_.k_page * kHeadDim;
      StoreScales<float>(scales, page_scales + entry * sizeof(float), n, 1);
    } else {
      const int64_t at = page * args_.k_scale_page_stride + entry * args_.k_scale_entry_stride;
      if (args_.k_scale_is_fp16)
        StoreScales<half>(scales, args_.k_scale + at * sizeof(half), n, args_.k_scale_entry_stride);
      else
        StoreScales<float>(scales, args_.k_scale + at * sizeof(float), n, args_.k_scale_entry_stride);
    }
  }

  template <class T>
  __aicore__ inline void StoreScales(const AscendC::LocalTensor<int8_t>& scales, uint64_t address, uint16_t n, int64_t stride) {
    AscendC::GlobalTensor<T> gm;
    gm.SetGlobalBuffer((__gm__ T*)address);
    const uint32_t gap = static_cast<uint32_t>((stride - 1) * sizeof(T));
    AscendC::DataCopyPad(gm, scales.template ReinterpretCast<T>(), AscendC::DataCopyExtParams(n, sizeof(T), 0, gap, 0));
  }

  Arguments args_;
  int windows_ = 0;
  int64_t slots_[kBatch];
  AscendC::TBuf<> pooled_buffer_, x_buffer_, y_buffer_, narrow_buffer_, cos_sin_buffer_, turned_buffer_, gamma_buffer_, factor_buffer_;
  AscendC::TBuf<AscendC::TPosition::VECIN> weight_buffer_;
  AscendC::TQue<AscendC::TPosition::VECOUT, 1> out_;
  AscendC::LocalTensor<float> pooled_, x_, y_, cos_sin_, turned_, gamma_, factor_, constant_, scale_;
};

}  // namespace dsv4
