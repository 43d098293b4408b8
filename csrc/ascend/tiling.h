// What the host decides before a launch: whether the device can do it, and how the tokens are cut among its cores.
// Plain C++, shared with the tests.
#pragma once

#include <cstdio>
#include <cstring>

#include "../layout.h"
#include "abi.h"

namespace dsv4 {

// How the tokens are cut: core c has the groups of four positions that begin in [c, c + 1) * tokens_per_core.
struct Tiling {
  int64_t cores;
  int64_t tokens_per_core;
};

inline Tiling cut(int64_t tokens, int64_t vector_cores) {
  // Where there is much to do, a core's entries come in sixteens, so that two cores seldom write scales of one block of
  // 32 bytes: no document promises that this is safe (README.md, "What is unverified").
  const int64_t grain = tokens >= 64 * 16 * vector_cores ? 64 : kRatio;
  const int64_t share = (tokens + vector_cores - 1) / vector_cores;
  const int64_t per_core = (share + grain - 1) / grain * grain;
  return {(tokens + per_core - 1) / per_core, per_core};
}

struct Product {
  const char* prefix;  // of the name that aclrtGetSocName gives
  int64_t architecture;
};
constexpr int64_t kA5 = 3510;  // the architecture that casts to fp8_e4m3fn_t
constexpr Product kProducts[] = {{"Ascend910B", 2201}, {"Ascend910_93", 2201}, {"Ascend950", kA5}};

// The table of what is supported: one line each. Returns the sentence for the first line that is broken, else nullptr.
// `built_for` is the architecture that the library was compiled for.
inline const char* unsupported(const Arguments& a, const char* soc, int64_t built_for, char* message, int64_t size) {
  const Product* product = nullptr;
  for (const Product& p : kProducts)
    if (std::strncmp(soc, p.prefix, std::strlen(p.prefix)) == 0) product = &p;
  const bool fp8 = a.k_format == kFp8Amax;
  const auto row_stride = [](int64_t stride, int64_t rows) {
    return rows <= 1 || (stride >= kRowWidth && stride <= 1 << 20);
  };
  const struct {
    bool holds;
    const char* what;
    long long value;
    const char* supported;
  } lines[] = {
      {product != nullptr, "the product", 0, "Ascend910B, Ascend910_93 and Ascend950"},
      {product && product->architecture == built_for, "a library built for architecture", built_for,
       "2201 on Ascend910B and Ascend910_93, 3510 on Ascend950; install again with SKBUILD_CMAKE_DEFINE=DSV4_ASCEND_ARCH=..."},
      {fp8 || a.k_format == kInt8Hadamard, "k_format number", a.k_format, "int8_hadamard and, on Ascend950, fp8_amax"},
      {!fp8 || built_for == kA5, "k_format fp8_amax on this product, number", a.k_format,
       "int8_hadamard; only Ascend950 has casts to fp8"},
      {a.state_page == 2 || a.state_page == 4 || a.state_page == 8, "a state page, in tokens, of", a.state_page,
       "2, 4 and 8"},
      {a.k_page == 32 || a.k_page == 64 || a.k_page == 128, "a K page, in entries, of", a.k_page, "32, 64 and 128"},
      {!fp8 || a.k_page_stride % 4 == 0, "a K page stride, in bytes, of", a.k_page_stride,
       "multiples of 4, for the fp32 scales"},
      {row_stride(a.kv_score_stride, a.tokens), "a row stride of kv_score of", a.kv_score_stride, "512 to 2^20"},
      {row_stride(a.state_row_stride, a.state_page), "a row stride of the state of", a.state_row_stride, "512 to 2^20"},
  };
  for (const auto& line : lines)
    if (!line.holds) {
      std::snprintf(message, size, "%s: %s %lld is not supported; supported: %s", soc, line.what, line.value,
                    line.supported);
      return message;
    }
  return nullptr;
}

}  // namespace dsv4
