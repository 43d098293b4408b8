// Vector instructions. SIMD-API/基础API/Memory矢量计算
// Masks and repeats: SIMD计算说明/{掩码,高维切分,连续计算}.md
#pragma once

#include <cmath>
#include <type_traits>

#include "tensor.h"

namespace AscendC {

// 辅助数据结构/{BinaryRepeatParams,UnaryRepeatParams}.md. Strides in blocks of 32 bytes.
struct BinaryRepeatParams {
  BinaryRepeatParams(uint8_t d, uint8_t s0, uint8_t s1, uint8_t dr, uint8_t s0r, uint8_t s1r)
      : dstBlkStride(d),
        src0BlkStride(s0),
        src1BlkStride(s1),
        dstRepStride(dr),
        src0RepStride(s0r),
        src1RepStride(s1r) {}
  uint8_t dstBlkStride, src0BlkStride, src1BlkStride, dstRepStride, src0RepStride, src1RepStride;
};
struct UnaryRepeatParams {
  UnaryRepeatParams(uint16_t d, uint16_t s, uint8_t dr, uint8_t sr)
      : dstBlkStride(d), srcBlkStride(s), dstRepStride(dr), srcRepStride(sr) {}
  uint16_t dstBlkStride, srcBlkStride;
  uint8_t dstRepStride, srcRepStride;
};
struct BrcbRepeatParams {
  BrcbRepeatParams(uint16_t block, uint16_t repeat) : dstBlkStride(block), dstRepStride(repeat) {}
  uint16_t dstBlkStride, dstRepStride;
};

namespace detail {

template <class T>
constexpr const char* type_name() {
  if constexpr (std::is_same_v<T, float>) return "float";
  if constexpr (std::is_same_v<T, half>) return "half";
  if constexpr (std::is_same_v<T, bfloat16_t>) return "bfloat16_t";
  if constexpr (std::is_same_v<T, fp8_e4m3fn_t>) return "fp8_e4m3fn_t";
  if constexpr (std::is_same_v<T, int8_t>) return "int8_t";
  if constexpr (std::is_same_v<T, int16_t>) return "int16_t";
}

constexpr int kRepeatBytes = 256;

// A repeat count: 1 to 255 (0 is a no-op on A2 and A3, and not promised to be one on the 950).
struct Repeats {
  template <class N>
  Repeats(N n) : value(static_cast<int>(n)) {
    emulation::require(n >= 1 && n <= 255, "range: repeatTime %d; it is 1 to 255", value);
  }
  int value;
};

// How an instruction runs through its operands: `repeats` of `lanes` elements, of which the last
// has `last`.
struct Shape {
  int lanes, repeats, last;
};

template <class... T>
constexpr int lanes() {
  return kRepeatBytes / static_cast<int>(std::max({sizeof(T)...}));
}

template <class... T>
Shape sliced(uint64_t mask, Repeats repeats) {
  emulation::require(mask >= 1 && mask <= (uint64_t)lanes<T...>(), "range: mask %d; it is 1 to %d",
                     (int)mask, lanes<T...>());
  return {(int)mask, repeats.value, (int)mask};
}

template <class... T>
Shape contiguous(int64_t count) {
  emulation::require(count >= 1, "range: count %d", (int)count);
  constexpr int n = lanes<T...>();
  return {n, static_cast<int>((count + n - 1) / n), static_cast<int>((count - 1) % n + 1)};
}

// An operand and its strides in blocks of 32 bytes, from block to block and from repeat to repeat.
template <class T>
struct Strided {
  static constexpr int kPerBlock = emulation::kBlock / sizeof(T);
  const LocalTensor<T>& tensor;
  int block, repeat;

  uint32_t offset(int r, int b) const {
    return (uint32_t)(r * repeat + b * block) * emulation::kBlock;
  }
};

template <class T>
void load(const Strided<T>& s, int repeat, int n, const char* name, T* out) {
  for (int done = 0, b = 0; done < n; done += s.kPerBlock, ++b) {
    const int bytes = std::min(n - done, s.kPerBlock) * (int)sizeof(T);
    s.tensor.check(s.offset(repeat, b), bytes, name);
    std::memcpy(out + done,
                emulation::core.read(s.tensor.address() + s.offset(repeat, b), bytes, name), bytes);
  }
}

template <class T>
void store(const Strided<T>& s, int repeat, int n, const char* name, const T* values) {
  for (int done = 0, b = 0; done < n; done += s.kPerBlock, ++b) {
    const int bytes = std::min(n - done, s.kPerBlock) * (int)sizeof(T);
    s.tensor.check(s.offset(repeat, b), bytes, name);
    std::memcpy(emulation::core.write(s.tensor.address() + s.offset(repeat, b), bytes, name),
                values + done, bytes);
  }
}

// In one repeat, a source and the target may be the same or apart. 通用说明和约束.md,
// 通用地址重叠约束
template <class T, class S>
void check_overlap(const Strided<T>& target, const Strided<S>& source, int repeat, int n,
                   const char* name) {
  const uint32_t t = target.tensor.address() + target.offset(repeat, 0),
                 s = source.tensor.address() + source.offset(repeat, 0);
  if (t == s && (target.block == source.block || n <= target.kPerBlock) && sizeof(T) == sizeof(S))
    return;
  for (int i = 0; i * target.kPerBlock < n; ++i)
    for (int j = 0; j * source.kPerBlock < n; ++j)
      emulation::require(
          t + i * target.block * emulation::kBlock != s + j * source.block * emulation::kBlock,
          "overlap: %s writes at %u part of what the same repeat reads", name,
          t + i * target.block * emulation::kBlock);
}

// The frame of every instruction that works element by element.
template <class T, class F, class... S>
void elementwise(const char* name, Shape shape, Strided<T> target, F compute,
                 Strided<S>... source) {
  emulation::core.issue_vector(std::string(name) + "/" + type_name<T>(), shape.repeats);
  target.tensor.check_aligned(name);
  (source.tensor.check_aligned(name), ...);
  emulation::require(target.block != 0 || shape.lanes <= target.kPerBlock,
                     "range: %s with a target block stride of 0", name);
  for (int r = 0; r < shape.repeats; ++r) {
    const int n = r + 1 < shape.repeats ? shape.lanes : shape.last;
    (check_overlap(target, source, r, n, name), ...);
    T result[kRepeatBytes];
    std::tuple<std::array<S, kRepeatBytes>...> values;
    std::apply(
        [&](auto&... array) {
          (load(source, r, n, name, array.data()), ...);
          for (int i = 0; i < n; ++i) result[i] = compute(array[i]...);
        },
        values);
    store(target, r, n, name, result);
    emulation::core.end_repeat();
  }
}

// Exp, Div and Sqrt are right to one ulp (Exp.md and Div.md say so of the 950); with a seed, they
// are wrong by as much.
inline float approximate(float exact) {
  if (!emulation::core.noise || exact == 0 || !std::isfinite(exact)) return exact;
  uint32_t bits;
  std::memcpy(&bits, &exact, sizeof bits);
  const uint64_t dice = (bits ^ emulation::core.noise) * 0x9e3779b97f4a7c15ull >> 61;
  return dice < 4 ? exact : std::nextafter(exact, dice < 6 ? INFINITY : -INFINITY);
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace detail

// 基础算术/{Add,Sub,Mul,Div,Max}.md. Types on A2 and A3: half, float, int32_t, (int16_t); only
// float is emulated.
#define DSV4_BINARY(NAME, VALUE)                                                        \
  inline void NAME(const LocalTensor<float>& target, const LocalTensor<float>& a,       \
                   const LocalTensor<float>& b, uint64_t mask, detail::Repeats repeats, \
                   const BinaryRepeatParams& p) {                                       \
    detail::elementwise(                                                                \
        #NAME, detail::sliced<float>(mask, repeats),                                    \
        detail::Strided<float>{target, p.dstBlkStride, p.dstRepStride},                 \
        [](float x, float y) { return VALUE; },                                         \
        detail::Strided<float>{a, p.src0BlkStride, p.src0RepStride},                    \
        detail::Strided<float>{b, p.src1BlkStride, p.src1RepStride});                   \
  }                                                                                     \
  inline void NAME(const LocalTensor<float>& target, const LocalTensor<float>& a,       \
                   const LocalTensor<float>& b, int32_t count) {                        \
    detail::elementwise(                                                                \
        #NAME, detail::contiguous<float>(count), detail::Strided<float>{target, 1, 8},  \
        [](float x, float y) { return VALUE; }, detail::Strided<float>{a, 1, 8},        \
        detail::Strided<float>{b, 1, 8});                                               \
  }
DSV4_BINARY(Add, x + y)
DSV4_BINARY(Sub, x - y)
DSV4_BINARY(Mul, x* y)
DSV4_BINARY(Div, detail::approximate(x / y))
DSV4_BINARY(Max, x > y || x != x ? x : y)
#undef DSV4_BINARY

// 基础算术/{Abs,Exp,Sqrt}.md
#define DSV4_UNARY(NAME, VALUE)                                                        \
  inline void NAME(const LocalTensor<float>& target, const LocalTensor<float>& source, \
                   int32_t count) {                                                    \
    detail::elementwise(                                                               \
        #NAME, detail::contiguous<float>(count), detail::Strided<float>{target, 1, 8}, \
        [](float x) { return VALUE; }, detail::Strided<float>{source, 1, 8});          \
  }
DSV4_UNARY(Abs, std::fabs(x))
DSV4_UNARY(Exp, detail::approximate(std::exp(x)))
DSV4_UNARY(Sqrt, detail::approximate(std::sqrt(x)))
#undef DSV4_UNARY

// 基础算术/{Adds,Muls,Maxs}.md
#define DSV4_SCALAR(NAME, VALUE)                                                                \
  inline void NAME(const LocalTensor<float>& target, const LocalTensor<float>& source, float y, \
                   int32_t count) {                                                             \
    detail::elementwise(                                                                        \
        #NAME, detail::contiguous<float>(count), detail::Strided<float>{target, 1, 8},          \
        [y](float x) { return VALUE; }, detail::Strided<float>{source, 1, 8});                  \
  }
DSV4_SCALAR(Adds, x + y)
DSV4_SCALAR(Muls, x* y)
DSV4_SCALAR(Maxs, x > y || x != x ? x : y)
#undef DSV4_SCALAR

// 数据填充/Duplicate.md
inline void Duplicate(const LocalTensor<float>& target, float value, int32_t count) {
  detail::elementwise("Duplicate", detail::contiguous<float>(count),
                      detail::Strided<float>{target, 1, 8}, [value] { return value; });
}

// 数据填充/Brcb.md: eight elements a repeat, each into a block of its own
template <class T>
void Brcb(const LocalTensor<T>& target, const LocalTensor<T>& source, detail::Repeats repeats,
          const BrcbRepeatParams& p) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  using emulation::require;
  emulation::core.issue_vector(std::string("Brcb/") + detail::type_name<T>(), repeats.value);
  target.check_aligned("Brcb"), source.check_aligned("Brcb");
  require(p.dstBlkStride != 0, "range: Brcb with a target block stride of 0");
  require(target.buffer() != source.buffer() || target.address() != source.address(),
          "overlap: Brcb onto its source");
  for (int r = 0; r < repeats.value; ++r) {
    for (int j = 0; j < 8; ++j) {
      const uint32_t from = (r * 8 + j) * sizeof(T),
                     to = (r * p.dstRepStride + j * p.dstBlkStride) * emulation::kBlock;
      source.check(from, sizeof(T), "Brcb"), target.check(to, emulation::kBlock, "Brcb");
      T value, filled[emulation::kBlock / sizeof(T)];
      std::memcpy(&value, emulation::core.read(source.address() + from, sizeof(T), "Brcb"),
                  sizeof(T));
      std::fill(std::begin(filled), std::end(filled), value);
      std::memcpy(emulation::core.write(target.address() + to, emulation::kBlock, "Brcb"), filled,
                  emulation::kBlock);
    }
    emulation::core.end_repeat();
  }
}

// 类型转换/Cast.md; rules of rounding: 数据结构/precision_conversion.md (to nearest even here; out
// of range saturates)
enum class RoundMode {
  CAST_NONE,
  CAST_RINT,
  CAST_FLOOR,
  CAST_CEIL,
  CAST_ROUND,
  CAST_TRUNC,
  CAST_ODD,
  CAST_HYBRID
};

namespace detail {

inline bfloat16_t to_bfloat16(float x) {
  const uint32_t bits = float_to_bits(x);
  if (x != x) return {(uint16_t)(bits >> 16 | 0x40)};
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float from_bfloat16(bfloat16_t x) { return bits_to_float((uint32_t)x.bits << 16); }

inline half to_half(float x) {
  const uint16_t sign = float_to_bits(x) >> 16 & 0x8000;
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7e00};
  if (magnitude >= 65520.0f) return {(uint16_t)(sign | (std::isinf(x) ? 0x7c00 : 0x7bff))};
  if (magnitude < 0x1p-14f)
    return {(uint16_t)(sign | (float_to_bits(magnitude + 0.5f) - float_to_bits(0.5f)))};
  const uint32_t bits = float_to_bits(magnitude);
  return {(uint16_t)(sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10)))};
}
inline float from_half(half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? std::ldexp(1024.0f + (float)mantissa, exponent - 25)
                                         : std::ldexp((float)mantissa, -24);
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

inline fp8_e4m3fn_t to_fp8(float x) {
  const uint8_t sign = float_to_bits(x) >> 24 & 0x80;
  if (x != x) return {(uint8_t)(sign | 0x7f)};
  const float magnitude = std::min(std::fabs(x), 448.0f);
  if (magnitude < 0x1p-6f)
    return {(uint8_t)(sign | (float_to_bits(magnitude + 16384.0f) - float_to_bits(16384.0f)))};
  const uint32_t bits = float_to_bits(magnitude);
  return {(uint8_t)(sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3)))};
}

// The table of the document, as far as it is emulated. What a NaN becomes as an integer is not
// documented: 0 here.
template <class I>
I saturate(float x) {
  const float rounded = std::nearbyint(x), most = std::numeric_limits<I>::max(),
              least = std::numeric_limits<I>::min();
  return x != x ? 0 : static_cast<I>(std::min(std::max(rounded, least), most));
}

// x rounded as `mode` says, to a format with so many bits behind the leading 1 and that least
// exponent; to an integer if both are 0. To nearest, ties to even, is done by `convert`.
inline float rounded(float x, RoundMode mode, int bits, int least) {
  if (mode == RoundMode::CAST_RINT || !std::isfinite(x) || x == 0) return x;
  const int last = bits ? std::max(std::ilogb(x), least) - bits : 0;
  const double scaled = std::ldexp(static_cast<double>(x), -last);
  const double whole = mode == RoundMode::CAST_ROUND   ? std::round(scaled)
                       : mode == RoundMode::CAST_FLOOR ? std::floor(scaled)
                       : mode == RoundMode::CAST_CEIL  ? std::ceil(scaled)
                                                       : std::trunc(scaled);
  return static_cast<float>(std::ldexp(whole, last));
}
template <class T>
float rounded_for(float x, RoundMode mode) {
  if constexpr (std::is_same_v<T, bfloat16_t>) return rounded(x, mode, 7, -126);
  if constexpr (std::is_same_v<T, half>) return rounded(x, mode, 10, -14);
  if constexpr (std::is_same_v<T, fp8_e4m3fn_t>) return rounded(x, mode, 3, -6);
  return rounded(x, mode, 0, 0);
}

inline float convert(float x, float*) { return x; }
inline bfloat16_t convert(float x, bfloat16_t*) { return to_bfloat16(x); }
inline half convert(float x, half*) { return to_half(x); }
inline int16_t convert(float x, int16_t*) { return saturate<int16_t>(x); }
inline fp8_e4m3fn_t convert(float x, fp8_e4m3fn_t*) { return to_fp8(x); }
inline float convert(bfloat16_t x, float*) { return from_bfloat16(x); }
inline half convert(int16_t x, half*) { return to_half(x); }
inline int8_t convert(half x, int8_t*) { return saturate<int8_t>(from_half(x)); }

}  // namespace detail

template <class T, class U>
void Cast(const LocalTensor<T>& target, const LocalTensor<U>& source, RoundMode mode,
          uint32_t count) {
  constexpr bool widens = std::is_same_v<U, bfloat16_t> && std::is_same_v<T, float>;
  emulation::require(widens == (mode == RoundMode::CAST_NONE) && mode <= RoundMode::CAST_TRUNC,
                     "range: Cast with a mode that is not emulated");
  if constexpr (std::is_same_v<T, fp8_e4m3fn_t>)
    emulation::require(emulation::core.product->is_950, "product: %s has no Cast to fp8_e4m3fn_t",
                       emulation::core.product->name);
  detail::elementwise(
      "Cast", detail::contiguous<T, U>(count),
      detail::Strided<T>{target, 1, 8 * (int)sizeof(T) / (int)std::max(sizeof(T), sizeof(U))},
      [mode](U x) {
        T* const type = nullptr;
        if constexpr (std::is_same_v<U, float>)
          return detail::convert(detail::rounded_for<T>(x, mode), type);
        else
          return detail::convert(x, type);
      },
      detail::Strided<U>{source, 1, 8 * (int)sizeof(U) / (int)std::max(sizeof(T), sizeof(U))});
}

// 数据排布转换/TransDataTo5HD.md, elements of 32 bits: element i of source block w goes to element
// w % 8 of target block 2 * i + w / 8. With one repeat the start is moved by the strides, as the
// document says.
constexpr int NCHW_CONV_ADDR_LIST_SIZE = 16;
struct TransDataTo5HDParams {
  TransDataTo5HDParams(bool, bool, detail::Repeats repeats, uint16_t target, uint16_t source)
      : repeatTimes(repeats.value), dstRepStride(target), srcRepStride(source) {}
  int repeatTimes, dstRepStride, srcRepStride;
};

template <class T>
void TransDataTo5HD(uint64_t targets[NCHW_CONV_ADDR_LIST_SIZE],
                    uint64_t sources[NCHW_CONV_ADDR_LIST_SIZE], const TransDataTo5HDParams& p) {
  static_assert(std::is_same_v<T, float>, "only float is emulated");
  constexpr const char* kName = "TransDataTo5HD";
  emulation::Core& core = emulation::core;
  core.issue_vector("TransDataTo5HD/float", p.repeatTimes, true);
  auto address = [&](uint64_t list, int stride, int repeat) {
    const uint64_t at = list - reinterpret_cast<uint64_t>(core.memory) +
                        uint64_t(p.repeatTimes == 1 ? stride : repeat * stride) * emulation::kBlock;
    emulation::require(at % emulation::kBlock == 0, "alignment: %s at %d, not a multiple of 32",
                       kName, (int)at);
    emulation::require(at < emulation::kUnifiedBuffer, "bounds: %s outside the unified buffer",
                       kName);
    return static_cast<uint32_t>(at);
  };
  for (int r = 0; r < p.repeatTimes; ++r) {
    float blocks[16][8], turned[16][8];
    for (int w = 0; w < 16; ++w)
      std::memcpy(blocks[w],
                  core.read(address(sources[w], p.srcRepStride, r), emulation::kBlock, kName),
                  sizeof blocks[w]);
    for (int w = 0; w < 16; ++w)
      for (int i = 0; i < 8; ++i) turned[2 * i + w / 8][w % 8] = blocks[w][i];
    for (int t = 0; t < 16; ++t)
      std::memcpy(core.write(address(targets[t], p.dstRepStride, r), emulation::kBlock, kName),
                  turned[t], sizeof turned[t]);
    core.end_repeat();
  }
}

}  // namespace AscendC
