// The formats of the K cache: how an entry is rounded and quantised. ops/reference.py is the same
// in torch, pages.h has the layouts.
#pragma once

#include "entry.h"

namespace {

constexpr int32_t kInfinity = 0x7f800000;

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
template <int channels>
int32_t largest_magnitude(const Entry<channels>& x) {
  Ints most = {};
  DSV4_UNROLL
  for (int i = 0; i < x.kVectors; ++i)
    most = larger(larger(magnitude_bits(x.even[i]), magnitude_bits(x.odd[i])), most);
  return fold(most, [](Ints a, Ints b) { return larger(a, b); });
}

// At least `least`; a NaN counts as infinity.
int32_t amax_bits(int32_t largest, float least) {
  return largest < bits_of(least) ? bits_of(least) : largest < kInfinity ? largest : kInfinity;
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

template <bool finite, int channels>
void store_scaled_codes(uint8_t* to, const Entry<channels>& x, float inverse) {
  const auto code = [inverse](Floats v) {
    const Floats rounded = (Floats)bits_as_bfloat16((Ints)v);
    return fp8_codes<finite>((finite ? rounded : v == v ? rounded : v) * inverse);
  };
  DSV4_UNROLL
  for (int i = 0; i < x.kVectors; ++i)
    store_bytes(to + 2 * i * kLanes, code(x.even[i]), code(x.odd[i]));
}

float power_of_two(int32_t exponent) { return float_of((127 + exponent) << 23); }

// Stores the codes of x and returns the exponent of their scale: the least power of two that brings
// the largest magnitude to 448 or less.
template <int channels>
int32_t store_fp8_codes(uint8_t* to, const Entry<channels>& x, int32_t largest, float least) {
  const int32_t bits = bits_as_bfloat16(amax_bits(largest, least));
  const int32_t exponent =
      (bits >> 23) - 127 - 8 + ((bits & 0x7fffff) > 0x600000);  // 448 = 1.75 * 2^8
  const auto store =
      bits < kInfinity ? store_scaled_codes<true, channels> : store_scaled_codes<false, channels>;
  store(to, x, power_of_two(-exponent));
  return exponent;
}

void store_fp8(const LayerArguments& a, int64_t slot, const Entry<kHeadDim>& x, int32_t largest) {
  const Fp8Place place = fp8_place(a, slot);
  const float scale = power_of_two(store_fp8_codes(place.codes, x, largest, kAmaxMin));
  std::memcpy(place.scale, &scale, sizeof scale);
}

template <int part, int channels>
Entry<part> channels_from(const Entry<channels>& x, int first) {
  Entry<part> y;
  std::memcpy(y.even, x.even + first / 2 / kLanes, sizeof y.even);
  std::memcpy(y.odd, x.odd + first / 2 / kLanes, sizeof y.odd);
  return y;
}

// As bfloat16; of a NaN always the same bits, whatever sign the CPU gave it.
template <int channels>
void store_bfloat16(void* to, const Entry<channels>& x) {
  constexpr int32_t kNaN = 0x7fc00000;
  const auto bits = [](Floats v) { return v == v ? bits_as_bfloat16((Ints)v) : broadcast(kNaN); };
  for (int i = 0; i < x.kVectors; ++i) {
    const Ints both = (Ints)((UnsignedInts)bits(x.even[i]) >> 16) | bits(x.odd[i]);
    std::memcpy(static_cast<uint8_t*>(to) + i * sizeof both, &both, sizeof both);
  }
}

// Codes of the channels that RoPE leaves alone, with an exponent for each block of them; the
// rotated ones as they are.
template <int channels>
void store_ds_mla(const LayerArguments& a, int64_t slot, const Entry<channels>& x) {
  static_assert(channels == kDsMlaCodes + kRopeDim);
  const DsMlaPlace place = ds_mla_place(a, slot);
  for (int b = 0; b < kDsMlaBlocks; ++b) {
    const auto block = channels_from<kDsMlaBlock>(x, b * kDsMlaBlock);
    const int32_t exponent = store_fp8_codes(place.codes + b * kDsMlaBlock, block,
                                             largest_magnitude(block), kFp8Max * kDsMlaScaleMin);
    place.exponents[b] = static_cast<uint8_t>(127 + exponent);
  }
  place.exponents[kDsMlaBlocks] = 0;
  store_bfloat16(place.rotated, channels_from<kRopeDim>(x, kDsMlaCodes));
}

// Multiplies by the Sylvester-Hadamard matrix of order 128, scaled to be orthonormal.
void hadamard(Entry<kHeadDim>& x) {
  constexpr float kOrthonormal = 0.08838834764831845f;  // 128^-1/2
  alignas(64) float pairs[2][kHeadDim / 2];
  DSV4_UNROLL
  for (int i = 0; i < x.kVectors; ++i) {
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
  for (int i = 0; i < x.kVectors; ++i) {
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
void store_int8(const LayerArguments& a, int64_t slot, Entry<kHeadDim>& x) {
  const auto rounded = [](Floats v) { return v == v ? (Floats)bits_as_bfloat16((Ints)v) : v; };
  DSV4_UNROLL
  for (int i = 0; i < x.kVectors; ++i) {
    x.even[i] = rounded(x.even[i]);
    x.odd[i] = rounded(x.odd[i]);
  }
  hadamard(x);
  const float most = float_of(amax_bits(largest_magnitude(x), kAmaxMin)), scale = most / kInt8Max,
              inverse = kInt8Max / most;
  const Int8Place place = int8_place(a, slot);
  DSV4_UNROLL
  for (int i = 0; i < x.kVectors; ++i)
    store_bytes(place.codes + 2 * i * kLanes, int8_codes(x.even[i] * inverse),
                int8_codes(x.odd[i] * inverse));
  if (a.k_scale_is_fp16)
    static_cast<uint16_t*>(a.k_scale)[place.scale] = half_of(scale);
  else
    static_cast<float*>(a.k_scale)[place.scale] = scale;
}

}  // namespace
