// What the host decides before a launch: whether the device can do it, and how the tokens are cut
// among its cores. Plain C++, shared with the tests.
#pragma once

#include <cstdio>
#include <cstring>

#include "../layout.h"
#include "abi.h"

namespace dsv4 {

// Of slot_mapping, whose piece a core has in its unified buffer.
constexpr int64_t kMostMappingStride = 4;

// How the tokens are cut: core c has the groups of four positions that begin in [c, c + 1) *
// tokens_per_core.
struct Tiling {
  int64_t cores;
  int64_t tokens_per_core;
};

inline Tiling cut(int64_t tokens, int64_t vector_cores) {
  // Where there is much to do, a core's entries come in sixteens, so that two cores seldom write
  // scales of one block of 32 bytes: no document promises that this is safe (README.md, "What is
  // unverified").
  const int64_t grain = tokens >= 64 * 16 * vector_cores ? 64 : kRatio;
  // A plan has a header even without tokens.
  const int64_t share = tokens > 0 ? (tokens + vector_cores - 1) / vector_cores : 1;
  const int64_t per_core = (share + grain - 1) / grain * grain;
  return {tokens > 0 ? (tokens + per_core - 1) / per_core : 1, per_core};
}

struct Product {
  const char* prefix;  // of the name that aclrtGetSocName gives
  int64_t architecture;
};
constexpr int64_t kA5 = 3510;  // the architecture that casts to fp8_e4m3fn_t
// "Ascend910B" alone is a chip of the first generation, of another architecture.
constexpr Product kProducts[] = {{"Ascend910B1", 2201},  {"Ascend910B2", 2201},
                                 {"Ascend910B3", 2201},  {"Ascend910B4", 2201},
                                 {"Ascend910_93", 2201}, {"Ascend950", kA5}};

// What a launch is to run on: the product, and the architecture that the library was compiled for.
struct Device {
  const char* soc;
  int64_t built_for;

  const Product* product() const {
    for (const Product& p : kProducts)
      if (std::strncmp(soc, p.prefix, std::strlen(p.prefix)) == 0) return &p;
    return nullptr;
  }
};

// A line of the table of what is supported.
struct Line {
  bool holds;
  const char* what;
  long long value;
  const char* supported;
};

inline bool is_state_page(int64_t tokens) { return tokens == 2 || tokens == 4 || tokens == 8; }
inline bool is_k_page(int64_t entries) { return entries == 32 || entries == 64 || entries == 128; }

// Whether a line is broken: then the sentence for the first that is, the device's own lines before
// `lines`, is in `message`.
template <int kLines>
bool broken(const Device& device, const Line (&lines)[kLines], char* message, int64_t size) {
  const Product* product = device.product();
  const Line own[] = {
      {product != nullptr, "the product", 0, "Ascend910B1 to B4, Ascend910_93 and Ascend950"},
      {product && product->architecture == device.built_for, "a library built for architecture",
       device.built_for,
       "2201 on Ascend910B and Ascend910_93, 3510 on Ascend950; install again with "
       "SKBUILD_CMAKE_DEFINE=DSV4_ASCEND_ARCH=..."},
  };
  const auto says = [&](const Line& line) {
    if (!line.holds)
      std::snprintf(message, size, "%s: %s %lld is not supported; supported: %s", device.soc,
                    line.what, line.value, line.supported);
    return !line.holds;
  };
  for (const Line& line : own)
    if (says(line)) return true;
  for (const Line& line : lines)
    if (says(line)) return true;
  return false;
}

inline bool unsupported(const PlanArguments& a, bool by_requests, const Device& device,
                        char* message, int64_t size) {
  const Line lines[] = {
      {is_state_page(a.state_page), "a state page, in tokens, of", a.state_page, "2, 4 and 8"},
      {!by_requests || is_k_page(a.k_page), "a K page, in entries, of", a.k_page, "32, 64 and 128"},
      {!by_requests || a.requests > 0, "a number of requests of", a.requests, "1 and more"},
      {!by_requests || !a.slot_mapping ||
           (a.slot_mapping_stride >= 1 && a.slot_mapping_stride <= kMostMappingStride),
       "a stride of slot_mapping, in int32, of", a.slot_mapping_stride, "1 to 4"},
  };
  return broken(device, lines, message, size);
}

inline bool unsupported(const RunArguments& a, const Device& device, char* message, int64_t size) {
  const bool fp8 = a.k_format == kFp8Amax, main = a.head_dim == Main4::kHeadDim;
  const int64_t width = main ? Main4::kRowWidth : Indexer::kRowWidth;
  const char* const widths = main ? "2048 to 2^20" : "512 to 2^20";
  const auto row_stride = [](int64_t stride, int64_t rows, int64_t least) {
    return rows <= 1 || (stride >= least && stride <= 1 << 20);
  };
  const Line lines[] = {
      {a.ratio == kRatio, "a ratio of", a.ratio,
       "4; leave layers of the ratio 128 to the engine's own compressor"},
      {main || a.head_dim == Indexer::kHeadDim, "a head dimension of", a.head_dim, "128 and 512"},
      {main ? a.k_format == kBf16 : fp8 || a.k_format == kInt8Hadamard, "k_format number",
       a.k_format, "int8_hadamard and, on Ascend950, fp8_amax; with the head dimension 512 bf16"},
      {!fp8 || device.built_for == kA5, "k_format fp8_amax on this product, number", a.k_format,
       "int8_hadamard; only Ascend950 has casts to fp8"},
      {is_state_page(a.state_page), "a state page, in tokens, of", a.state_page, "2, 4 and 8"},
      {is_k_page(a.k_page), "a K page, in entries, of", a.k_page, "32, 64 and 128"},
      {!fp8 || a.k_page_stride % 4 == 0, "a K page stride, in bytes, of", a.k_page_stride,
       "multiples of 4, for the fp32 scales"},
      {row_stride(a.kv_score_stride, a.tokens, width), "a row stride of kv_score of",
       a.kv_score_stride, widths},
      {row_stride(a.state_row_stride, a.state_page, width), "a row stride of the state of",
       a.state_row_stride, widths},
      {row_stride(a.cos_sin_stride, a.cos_sin_rows, kRopeDim), "a row stride of cos_sin_cache of",
       a.cos_sin_stride, "64 to 2^20"},
  };
  return broken(device, lines, message, size);
}

}  // namespace dsv4
