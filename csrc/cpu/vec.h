// The little vector language of the kernels: DSV4_LANES floats at a time, the same IEEE operations on every
// instruction set (a multiply-add is fused where it says so and nowhere else; no libm), so that results are bitwise equal
// everywhere.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = DSV4_LANES;
typedef float Floats __attribute__((vector_size(4 * DSV4_LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * DSV4_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * DSV4_LANES)));
typedef int8_t Bytes __attribute__((vector_size(DSV4_LANES)));

struct bfloat16 {
  uint16_t bits;
};

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Floats load(const bfloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, Ints) << 16);
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline void store_bytes(void* p, Ints v) {
  const Bytes b = __builtin_convertvector(v, Bytes);
  std::memcpy(p, &b, sizeof b);
}

// a * b + c, rounded once: an instruction on AVX-512, AVX2 and aarch64, a call of libm's exact fmaf elsewhere.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  Floats r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
inline Floats broadcast(float x) { return x - Floats{}; }
inline Ints broadcast(int32_t i) { return i - Ints{}; }
inline Ints magnitude_bits(Floats v) { return (Ints)v & 0x7fffffff; }

inline int32_t bits_of(float x) {
  int32_t i;
  std::memcpy(&i, &x, sizeof i);
  return i;
}

inline float float_of(int32_t i) {
  float x;
  std::memcpy(&x, &i, sizeof x);
  return x;
}

// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even, in the float's own rounding.
constexpr float kRounder = 12582912.0f;

// exp(x) for x <= 0, within 2.3 ulp; below the smallest normal float it is 0. exp(x) = 2^n * exp(r), with
// |r| <= ln(2)/2 and a minimax polynomial of degree 5 for exp(r). ln(2) is split so that n * kLn2High is exact.
inline Floats exp_nonpositive(Floats x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kSmallest = -87.3f;
  const Floats shifted = multiply_add(x, broadcast(kLog2E), broadcast(kRounder));
  const Floats n = shifted - kRounder;
  const Floats r = multiply_add(n, broadcast(-kLn2Low), multiply_add(n, broadcast(-kLn2High), x));
  Floats p = multiply_add(broadcast(0.008312501f), r, broadcast(0.04189033f));
  p = multiply_add(p, r, broadcast(0.16667116f));
  p = multiply_add(p, r, broadcast(0.4999923f));
  p = multiply_add(p, r, broadcast(1.0f));
  p = multiply_add(p, r, broadcast(1.0f));
  const Floats power = (Floats)(((Ints)shifted + 127) << 23);  // the low bits of `shifted` are n
  const Floats result = p * power;
  return x < kSmallest ? Floats{} : result;
}

}  // namespace
