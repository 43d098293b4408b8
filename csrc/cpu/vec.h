// The little vector language of the kernels: DSV4_LANES floats at a time, the same IEEE operations
// on every instruction set (a multiply-add is fused where it says so and nowhere else; no libm), so
// that results are bitwise equal everywhere.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// GCC 12 leaves longer bodies rolled, and their vectors in memory.
#define DSV4_UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int kLanes = DSV4_LANES;
using Floats = float __attribute__((vector_size(4 * DSV4_LANES)));
using Ints = int32_t __attribute__((vector_size(4 * DSV4_LANES)));
using UnsignedInts = uint32_t __attribute__((vector_size(4 * DSV4_LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * DSV4_LANES)));

struct bfloat16 {
  uint16_t bits;
};

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <int... i>
inline Floats widened(Halves h, std::integer_sequence<int, i...>) {
  return (Floats)__builtin_shufflevector(Halves{}, h, (i % 2 ? kLanes + i / 2 : i / 2)...);
}

// A bfloat16 is the upper half of a float: one shuffle with zeros where a conversion takes two
// instructions or more.
inline Floats load(const bfloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return widened(h, std::make_integer_sequence<int, 2 * kLanes>());
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

// Around the caches, to a p that is aligned to a vector; without such stores an ordinary one.
#if defined(__SSE2__)
constexpr bool kHasStoresPastCache = true;
#else
constexpr bool kHasStoresPastCache = false;
#endif
#if defined(__AVX512F__)
inline void store_past_cache(float* p, Floats v) { _mm512_stream_ps(p, (__m512)v); }
#elif defined(__AVX__)
inline void store_past_cache(float* p, Floats v) { _mm256_stream_ps(p, (__m256)v); }
#elif defined(__SSE2__)
inline void store_past_cache(float* p, Floats v) { _mm_stream_ps(p, (__m128)v); }
#else
inline void store_past_cache(float* p, Floats v) { store(p, v); }
#endif

// To be called before other threads may read what went around the caches.
inline void wait_for_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The even and the odd ones of 2 * kLanes values.
struct Pairs {
  Floats even, odd;
};

template <int... i>
inline Pairs pairs(Floats low, Floats high, std::integer_sequence<int, i...>) {
  return {__builtin_shufflevector(low, high, 2 * i...),
          __builtin_shufflevector(low, high, 2 * i + 1 ...)};
}

inline Pairs pairs(Floats low, Floats high) {
  return pairs(low, high, std::make_integer_sequence<int, kLanes>());
}

// Stores the low byte of each of `even` and `odd`, alternately.
inline void store_bytes(void* p, Ints even, Ints odd) {
  const Halves h = __builtin_convertvector((even & 0xff) | odd << 8, Halves);
  std::memcpy(p, &h, sizeof h);
}

// a * b + c, rounded once: an instruction on AVX-512, AVX2 and aarch64, a call of libm's exact fmaf
// elsewhere.
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

template <int step, class V, int... i>
inline V turned(V v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i + step) % kLanes...);
}

// All lanes folded into one by `op`, in halves.
template <int step = kLanes / 2, class V, class Op>
inline auto fold(V v, Op op) {
  if constexpr (step == 0)
    return v[0];
  else
    return fold<step / 2>(op(v, turned<step>(v, std::make_integer_sequence<int, kLanes>())), op);
}

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

// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even, in the float's own
// rounding.
constexpr float kRounder = 12582912.0f;

// exp(x) for x <= 0, as weights of a softmax need it: within 1.8e-7 of itself down to -1 and
// within 1.4e-6 down to -87, below which it is 0. exp(x) = 2^n * 2^f with |f| <= 1/2 and a minimax
// polynomial of degree 5 for 2^f. The product x * log2(e) is not taken apart: what that loses grows
// with -x, slower than the weight falls. Some at a time and step by step: no CPU looks far enough
// ahead to overlap such chains by itself.
template <int n>
inline void exp_nonpositive(Floats (&x)[n]) {
  constexpr float kLog2E = 1.44269504f, kSmallest = -87.0f;
  constexpr float kBiased = kRounder + 127;  // leaves n with the exponent's bias in the low bits
  constexpr float kCoefficients[] = {0.00967151299f, 0.0555073358f, 0.240222424f, 0.693147004f,
                                     1.0f};
  Floats shifted[n], p[n];
  Ints underflows[n];
  DSV4_UNROLL
  for (int j = 0; j < n; ++j) underflows[j] = x[j] < kSmallest;
  DSV4_UNROLL
  for (int j = 0; j < n; ++j)
    shifted[j] = multiply_add(x[j], broadcast(kLog2E), broadcast(kBiased));
  DSV4_UNROLL
  for (int j = 0; j < n; ++j) x[j] = multiply_add(x[j], broadcast(kLog2E), kBiased - shifted[j]);
  DSV4_UNROLL
  for (int j = 0; j < n; ++j) p[j] = broadcast(0.00132647273f);
  DSV4_UNROLL
  for (int i = 0; i < 5; ++i) DSV4_UNROLL
  for (int j = 0; j < n; ++j) p[j] = multiply_add(p[j], x[j], broadcast(kCoefficients[i]));
  DSV4_UNROLL
  for (int j = 0; j < n; ++j) {
    const Floats power = (Floats)((Ints)shifted[j] << 23);
    x[j] = underflows[j] ? Floats{} : p[j] * power;
  }
}

}  // namespace
