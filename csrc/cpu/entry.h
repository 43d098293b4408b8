// The arithmetic of one K entry: pool eight rows, RMSNorm, RoPE, round, quantise. ops/reference.py is the same in torch.
#pragma once

#include "../layout.h"
#include "abi.h"
#include "vec.h"

namespace {

using namespace dsv4;

// One row of a window: the kv half that this window pools; its gate half lies kKvWidth further on.
template <class T>
struct Row {
  const T* values;
  const float* bias;  // added to the gate
};

// softmax over the eight rows, per channel, in the order of the positions; divided at the end.
template <class T>
void pool(const Row<T> (&rows)[kWindow], float* pooled) {
  for (int c = 0; c < kHeadDim; c += kLanes) {
    Floats score[kWindow];
    for (int j = 0; j < kWindow; ++j) score[j] = load(rows[j].values + kKvWidth + c) + load(rows[j].bias + c);
    Floats most = score[0];
    for (int j = 1; j < kWindow; ++j) most = larger(score[j], most);
    Floats numerator = {}, denominator = {};
    for (int j = 0; j < kWindow; ++j) {
      const Floats weight = exp_nonpositive(score[j] - most);
      numerator += weight * load(rows[j].values + c);
      denominator += weight;
    }
    store(pooled + c, numerator / denominator);
  }
}

// RMSNorm. The sum of squares is taken in sixteen lanes whatever the vector length, then folded in halves.
void normalise(float* x, const float* weight, float eps) {
  constexpr int kSums = 16;
  float sums[kSums] = {};
  for (int c = 0; c < kHeadDim; c += kSums)
    for (int i = 0; i < kSums; ++i) sums[i] += x[c + i] * x[c + i];
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  const float scale = 1.0f / __builtin_sqrtf(sums[0] / kHeadDim + eps);
  for (int c = 0; c < kHeadDim; c += kLanes) store(x + c, load(x + c) * scale * load(weight + c));
}

// Rotates interleaved pairs; `cos_sin` is the table's row: 32 cosines, then 32 sines.
void rotate(float* x, const float* cos_sin) {
  constexpr int kPairs = kRopeDim / 2;
  for (int k = 0; k < kPairs; ++k) {
    const float a = x[2 * k], b = x[2 * k + 1], cos = cos_sin[k], sin = cos_sin[kPairs + k];
    x[2 * k] = a * cos - b * sin;
    x[2 * k + 1] = b * cos + a * sin;
  }
}

// To bfloat16 and back, to nearest, ties to even.
void round_to_bfloat16(float* x) {
  for (int c = 0; c < kHeadDim; c += kLanes) {
    const Floats v = load(x + c);
    const Ints bits = (Ints)v, rounded = (bits + 0x7fff + (bits >> 16 & 1)) & ~0xffff;
    store(x + c, v == v ? (Floats)rounded : v);  // the sum could carry a NaN into the sign
  }
}

// The largest magnitude, at least kAmaxFloor. Magnitudes are compared as integers, which order floats and put a NaN
// above infinity; it counts as infinity.
float amax(const float* x) {
  Ints most = magnitude_bits(load(x));
  for (int c = kLanes; c < kHeadDim; c += kLanes) most = larger(magnitude_bits(load(x + c)), most);
  int32_t result = bits_of(kAmaxFloor);
  for (int i = 0; i < kLanes; ++i) result = most[i] > result ? most[i] : result;
  const int32_t infinity = bits_of(__builtin_inff());
  return float_of(result < infinity ? result : infinity);
}

// The e4m3fn codes of v, to nearest, ties to even, saturating; a NaN becomes 0x7f, whatever sign the CPU gave it.
Ints fp8_codes(Floats v) {
  const Ints sign = (Ints)v >> 24 & 0x80;
  const Floats magnitude = (Floats)magnitude_bits(v);
  const Floats bounded = magnitude > kFp8Max ? broadcast(kFp8Max) : magnitude;
  const Ints bits = (Ints)bounded;
  const Ints normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);  // exponent bias 127 -> 7
  constexpr float kSubnormalRounder = 16384.0f;  // its last place is 2^-9, the smallest e4m3fn
  const Ints subnormal = (Ints)(bounded + kSubnormalRounder) - bits_of(kSubnormalRounder);
  const Ints code = bounded < 0x1p-6f ? subnormal : normal;
  return magnitude != magnitude ? broadcast(0x7f) : sign | code;
}

// fp8 page: the scale is the least power of two that brings the largest magnitude to 448 or less.
void store_fp8(const Arguments& a, int64_t slot, const float* x) {
  const int32_t bits = bits_of(amax(x));
  const int32_t exponent = (bits >> 23) - 127 - 8 + ((bits & 0x7fffff) > 0x600000);  // 448 = 1.75 * 2^8
  const float scale = float_of((127 + exponent) << 23), inverse = float_of((127 - exponent) << 23);
  uint8_t* page = static_cast<uint8_t*>(a.k_cache) + slot / kFp8PageEntries * a.k_page_stride;
  const int64_t entry = slot % kFp8PageEntries;
  for (int c = 0; c < kHeadDim; c += kLanes) store_bytes(page + entry * kHeadDim + c, fp8_codes(load(x + c) * inverse));
  std::memcpy(page + kFp8ScaleOffset + entry * sizeof scale, &scale, sizeof scale);
}

// Multiplies by the Sylvester-Hadamard matrix of order 128, scaled to be orthonormal.
void hadamard(float* x) {
  for (int stride = 1; stride < kHeadDim; stride *= 2)
    for (int block = 0; block < kHeadDim; block += 2 * stride)
      for (int i = block; i < block + stride; ++i) {
        const float p = x[i], q = x[i + stride];
        x[i] = p + q;
        x[i + stride] = p - q;
      }
  constexpr float kOrthonormal = 0.08838834764831845f;  // 128^-1/2
  for (int i = 0; i < kHeadDim; ++i) x[i] *= kOrthonormal;
}

// IEEE half of x >= 0, to nearest, ties to even.
uint16_t half_of(float x) {
  constexpr float kSubnormalRounder = 0.5f;  // its last place is 2^-24, the smallest half
  if (x < 0x1p-14f) return bits_of(x + kSubnormalRounder) - bits_of(kSubnormalRounder);
  const int32_t bits = bits_of(x), code = ((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10);
  constexpr int32_t kInfinity = 0x7c00;
  return code < kInfinity ? code : kInfinity;
}

// int8 entry: Hadamard rotation, then the scale that brings the largest magnitude to 127.
void store_int8(const Arguments& a, int64_t slot, float* x) {
  hadamard(x);
  const float most = amax(x), scale = most / kInt8Max, inverse = kInt8Max / most;
  const int64_t page = slot / a.k_page, entry = slot % a.k_page;
  int8_t* codes = static_cast<int8_t*>(a.k_cache) + page * a.k_page_stride + entry * a.k_entry_stride;
  for (int c = 0; c < kHeadDim; c += kLanes) {
    const Floats scaled = load(x + c) * inverse;
    const Ints code = (Ints)(scaled + kRounder) - bits_of(kRounder);
    const Ints bounded = code > 127 ? broadcast(127) : code < -127 ? broadcast(-127) : code;
    store_bytes(codes + c, scaled == scaled ? bounded : Ints{});
  }
  const int64_t at = page * a.k_scale_page_stride + entry * a.k_scale_entry_stride;
  if (a.k_scale_is_fp16)
    static_cast<uint16_t*>(a.k_scale)[at] = half_of(scale);
  else
    static_cast<float*>(a.k_scale)[at] = scale;
}

// From the pooled vector to the stored entry of the window that `token` closes. `x` is overwritten.
void finish_entry(const Arguments& a, const float* norm_weight, int64_t token, float* x) {
  normalise(x, norm_weight, static_cast<float>(a.eps));
  const int64_t group_start = a.positions[token] - kRatio + 1;
  rotate(x + kHeadDim - kRopeDim, a.cos_sin + group_start * a.cos_sin_stride);
  round_to_bfloat16(x);
  if (a.k_format == kFp8Pow2)
    store_fp8(a, a.k_slots[token], x);
  else
    store_int8(a, a.k_slots[token], x);
}

}  // namespace
