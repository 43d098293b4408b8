// The arithmetic of one K entry: pool eight rows, RMSNorm, RoPE, round, quantise. ops/reference.py
// is the same in torch.
#pragma once

#include "call.h"
#include "vec.h"

namespace {

using namespace dsv4;

constexpr int32_t kInfinity = 0x7f800000;

// The channels of one entry, the even ones apart from the odd ones: RoPE rotates such pairs.
constexpr int kPairVectors = kHeadDim / 2 / kLanes;
struct Entry {
  Floats even[kPairVectors], odd[kPairVectors];
};

template <class T>
Entry paired(const T* values) {
  Entry x;
  for (int i = 0; i < kPairVectors; ++i) {
    const T* p = values + 2 * i * kLanes;
    x.even[i] = pairs(load(p), load(p + kLanes)).even;
    x.odd[i] = pairs(load(p), load(p + kLanes)).odd;
  }
  return x;
}

Entry norm_weight(const LayerArguments& a) {
  return a.norm_weight_is_bf16 ? paired(static_cast<const bfloat16*>(a.norm_weight))
                               : paired(static_cast<const float*>(a.norm_weight));
}

// The rows of a window: of each the kv half that this window pools; the gate half lies kKvWidth
// further on.
struct Window {
  const float* row[kWindow];
};

template <class T>
const T* kv_score_row(const LayerCall& call, int64_t token) {
  return static_cast<const T*>(call.kv_score) + token * call.kv_score_stride;
}

// The first four rows of a window lend it their front halves, the last four, its own group, their
// back halves.
int half_of_row(int j) { return j < kRatio ? 0 : kHeadDim; }

// A row that the request does not have: no kv, and a gate that the softmax ignores.
struct MaskedRow {
  float values[kKvWidth + kHeadDim] = {};
  constexpr MaskedRow() {
    for (int c = 0; c < kHeadDim; ++c) values[kKvWidth + c] = -__builtin_inff();
  }
};
constexpr MaskedRow kMaskedRow;

// softmax over the eight rows, per channel; divided at the end. Two sums each, for shorter chains.
Floats pool(const Window& window, int c) {
  Floats score[kWindow];
  DSV4_UNROLL
  for (int j = 0; j < kWindow; ++j) score[j] = load(window.row[j] + kKvWidth + c);
  const Floats most = larger(larger(larger(score[0], score[1]), larger(score[2], score[3])),
                             larger(larger(score[4], score[5]), larger(score[6], score[7])));
  DSV4_UNROLL
  for (int j = 0; j < kWindow; ++j) score[j] -= most;
  exp_nonpositive(score);
  Floats numerator[2] = {}, denominator[2] = {};
  DSV4_UNROLL
  for (int j = 0; j < kWindow; ++j) {
    numerator[j % 2] = multiply_add(score[j], load(window.row[j] + c), numerator[j % 2]);
    denominator[j % 2] += score[j];
  }
  return (numerator[0] + numerator[1]) / (denominator[0] + denominator[1]);
}

Entry pool(const Window& window) {
  alignas(64) float pooled[kHeadDim];
  for (int c = 0; c < kHeadDim; c += kLanes) store(pooled + c, pool(window, c));
  return paired(pooled);
}

// What RMSNorm multiplies x by. The sum of squares is taken in sixteen lanes whatever the vector
// length.
float inverse_rms(const Entry& x, float eps) {
  constexpr int kSums = 16 / kLanes;
  Floats sums[kSums] = {};
  DSV4_UNROLL
  for (int i = 0; i < kPairVectors; ++i) {
    Floats& sum = sums[i % kSums];
    sum = multiply_add(x.odd[i], x.odd[i], multiply_add(x.even[i], x.even[i], sum));
  }
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  const float sum = fold(sums[0], [](Floats a, Floats b) { return a + b; });
  return 1.0f / __builtin_sqrtf(sum / kHeadDim + eps);
}

void normalise(Entry& x, float scale, const Entry& weight) {
  DSV4_UNROLL
  for (int i = 0; i < kPairVectors; ++i) {
    x.even[i] = x.even[i] * scale * weight.even[i];
    x.odd[i] = x.odd[i] * scale * weight.odd[i];
  }
}

// Rotates the last kRopeDim channels; `cos_sin` is the table's row: 32 cosines, then 32 sines.
void rotate(Entry& x, const float* cos_sin) {
  constexpr int kRotated = kRopeDim / 2 / kLanes;
  DSV4_UNROLL
  for (int i = 0; i < kRotated; ++i) {
    Floats& even = x.even[kPairVectors - kRotated + i];
    Floats& odd = x.odd[kPairVectors - kRotated + i];
    const Floats a = even, b = odd;
    const Floats cos = load(cos_sin + i * kLanes), sin = load(cos_sin + kRopeDim / 2 + i * kLanes);
    even = a * cos - b * sin;
    odd = b * cos + a * sin;
  }
}

// The bits of a float rounded to bfloat16, to nearest, ties to even. Of a NaN the sum carries into
// the sign, hence unsigned: such a lane's result is not used.
template <class U>
U rounded_bits(U bits) {
  return (bits + 0x7fffu + (bits >> 16 & 1u)) & ~0xffffu;
}

Ints bits_as_bfloat16(Ints bits) { return (Ints)rounded_bits((UnsignedInts)bits); }
int32_t bits_as_bfloat16(int32_t bits) {
  return static_cast<int32_t>(rounded_bits(static_cast<uint32_t>(bits)));
}

// The bits of the largest magnitude. Magnitudes are compared as integers, which order floats and
// put a NaN above infinity.
int32_t largest_magnitude(const Entry& x) {
  Ints most = {};
  DSV4_UNROLL
  for (int i = 0; i < kPairVectors; ++i)
    most = larger(larger(magnitude_bits(x.even[i]), magnitude_bits(x.odd[i])), most);
  return fold(most, [](Ints a, Ints b) { return larger(a, b); });
}

// At least kAmaxFloor; a NaN counts as infinity.
int32_t amax_bits(int32_t largest) {
  const int32_t least = bits_of(kAmaxFloor);
  return largest < least ? least : largest < kInfinity ? largest : kInfinity;
}

// The e4m3fn codes of v, to nearest, ties to even. Unless all is `finite`, magnitudes above 448
// saturate, and a NaN becomes 0x7f, whatever sign the CPU gave it.
template <bool finite>
Ints fp8_codes(Floats v) {
  const Ints sign = (Ints)v >> 24 & 0x80;
  Floats magnitude = (Floats)magnitude_bits(v);
  if (!finite) magnitude = magnitude > kFp8Max ? broadcast(kFp8Max) : magnitude;
  const UnsignedInts bits = (UnsignedInts)magnitude;  // of a NaN the sum below goes beyond an int
  const Ints normal =
      (Ints)((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120 << 3);  // exponent bias 127 -> 7
  constexpr float kSubnormalRounder = 16384.0f;  // its last place is 2^-9, the smallest e4m3fn
  const Ints subnormal = (Ints)(magnitude + kSubnormalRounder) - bits_of(kSubnormalRounder);
  const Ints code = sign | (magnitude < 0x1p-6f ? subnormal : normal);
  return finite ? code : v == v ? code : broadcast(0x7f);
}

template <bool finite>
void store_fp8_codes(uint8_t* to, const Entry& x, float inverse) {
  const auto code = [inverse](Floats v) {
    const Floats rounded = (Floats)bits_as_bfloat16((Ints)v);
    return fp8_codes<finite>((finite ? rounded : v == v ? rounded : v) * inverse);
  };
  DSV4_UNROLL
  for (int i = 0; i < kPairVectors; ++i)
    store_bytes(to + 2 * i * kLanes, code(x.even[i]), code(x.odd[i]));
}

// fp8 page: the scale is the least power of two that brings the largest magnitude to 448 or less.
void store_fp8(const LayerArguments& a, int64_t slot, const Entry& x, int32_t largest) {
  const int32_t bits = bits_as_bfloat16(amax_bits(largest));
  const int32_t exponent =
      (bits >> 23) - 127 - 8 + ((bits & 0x7fffff) > 0x600000);  // 448 = 1.75 * 2^8
  const float scale = float_of((127 + exponent) << 23), inverse = float_of((127 - exponent) << 23);
  uint8_t* page = static_cast<uint8_t*>(a.k_cache) + slot / kFp8PageEntries * a.k_page_stride;
  const int64_t entry = slot % kFp8PageEntries;
  (bits < kInfinity ? store_fp8_codes<true> : store_fp8_codes<false>)(page + entry * kHeadDim, x,
                                                                      inverse);
  std::memcpy(page + kFp8ScaleOffset + entry * sizeof scale, &scale, sizeof scale);
}

// Multiplies by the Sylvester-Hadamard matrix of order 128, scaled to be orthonormal.
void hadamard(Entry& x) {
  constexpr float kOrthonormal = 0.08838834764831845f;  // 128^-1/2
  alignas(64) float pairs[2][kHeadDim / 2];
  DSV4_UNROLL
  for (int i = 0; i < kPairVectors; ++i) {
    store(pairs[0] + i * kLanes, x.even[i] + x.odd[i]);
    store(pairs[1] + i * kLanes, x.even[i] - x.odd[i]);
  }
  for (float* half : pairs)
    for (int stride = 1; stride < kHeadDim / 2; stride *= 2)
      for (int block = 0; block < kHeadDim / 2; block += 2 * stride)
        for (int k = block; k < block + stride; ++k) {
          const float p = half[k], q = half[k + stride];
          half[k] = p + q;
          half[k + stride] = p - q;
        }
  DSV4_UNROLL
  for (int i = 0; i < kPairVectors; ++i) {
    x.even[i] = load(pairs[0] + i * kLanes) * kOrthonormal;
    x.odd[i] = load(pairs[1] + i * kLanes) * kOrthonormal;
  }
}

// IEEE half of x >= 0, to nearest, ties to even.
uint16_t half_of(float x) {
  constexpr float kSubnormalRounder = 0.5f;  // its last place is 2^-24, the smallest half
  if (x < 0x1p-14f) return bits_of(x + kSubnormalRounder) - bits_of(kSubnormalRounder);
  const int32_t bits = bits_of(x), code = ((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10);
  constexpr int32_t kHalfInfinity = 0x7c00;
  return code < kHalfInfinity ? code : kHalfInfinity;
}

// To the nearest integer within +-127; a NaN becomes 0.
Ints int8_codes(Floats v) {
  const Ints code = (Ints)(v + kRounder) - bits_of(kRounder);
  const Ints bounded = code > 127 ? broadcast(127) : code < -127 ? broadcast(-127) : code;
  return v == v ? bounded : Ints{};
}

// int8 entry: rounded, Hadamard rotation, then the scale that brings the largest magnitude to 127.
void store_int8(const LayerArguments& a, int64_t slot, Entry& x) {
  const auto rounded = [](Floats v) { return v == v ? (Floats)bits_as_bfloat16((Ints)v) : v; };
  DSV4_UNROLL
  for (int i = 0; i < kPairVectors; ++i) {
    x.even[i] = rounded(x.even[i]);
    x.odd[i] = rounded(x.odd[i]);
  }
  hadamard(x);
  const float most = float_of(amax_bits(largest_magnitude(x))), scale = most / kInt8Max,
              inverse = kInt8Max / most;
  const int64_t page = slot / a.k_page, entry = slot % a.k_page;
  int8_t* codes =
      static_cast<int8_t*>(a.k_cache) + page * a.k_page_stride + entry * a.k_entry_stride;
  DSV4_UNROLL
  for (int i = 0; i < kPairVectors; ++i)
    store_bytes(codes + 2 * i * kLanes, int8_codes(x.even[i] * inverse),
                int8_codes(x.odd[i] * inverse));
  const int64_t at = page * a.k_scale_page_stride + entry * a.k_scale_entry_stride;
  if (a.k_scale_is_fp16)
    static_cast<uint16_t*>(a.k_scale)[at] = half_of(scale);
  else
    static_cast<float*>(a.k_scale)[at] = scale;
}

// Pooled windows on their way to the cache. They are finished some at a time and step by step:
// within an entry each step waits for a sum over all of it, which other entries fill.
class Entries {
 public:
  Entries(const LayerCall& call, const Entry& norm_weight)
      : call_(call), a_(call.layer), norm_weight_(norm_weight) {}

  // `token` closes the window.
  void add(int64_t token, const Entry& pooled) {
    token_[count_] = token;
    entry_[count_++] = pooled;
    if (count_ == kMost) finish();
  }

  // To be called after the last one.
  void finish() {
    float scale[kMost];
    for (int i = 0; i < count_; ++i) scale[i] = inverse_rms(entry_[i], static_cast<float>(a_.eps));
    for (int i = 0; i < count_; ++i) {
      normalise(entry_[i], scale[i], norm_weight_);
      rotate(entry_[i], a_.cos_sin + (call_.positions[token_[i]] - kRatio + 1) * a_.cos_sin_stride);
    }
    a_.k_format == kFp8Pow2 ? store_fp8() : store_int8();
    count_ = 0;
  }

 private:
  static constexpr int kMost = 4;

  void store_fp8() {
    int32_t largest[kMost];
    for (int i = 0; i < count_; ++i) largest[i] = largest_magnitude(entry_[i]);
    for (int i = 0; i < count_; ++i)
      ::store_fp8(a_, call_.k_slots[token_[i]], entry_[i], largest[i]);
  }

  void store_int8() {
    for (int i = 0; i < count_; ++i) ::store_int8(a_, call_.k_slots[token_[i]], entry_[i]);
  }

  const LayerCall& call_;
  const LayerArguments& a_;
  const Entry& norm_weight_;
  Entry entry_[kMost];
  int64_t token_[kMost];
  int count_ = 0;
};

}  // namespace
