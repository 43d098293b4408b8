// Geometry of DeepSeek-V4's compressors, shared by every native kernel.
//
// Source: DeepSeek-V4's configuration (head_dim 512, index_head_dim 128, qk_rope_head_dim 64,
// compress ratio 4 with overlap and 128 without) and vLLM 0.32's pages.
// vllm_dsv4_indexer/contract.py holds the same numbers for Python; a test compares them.
#pragma once

namespace dsv4 {

// Positions pooled per entry. With the ratio 4 windows overlap: an entry pools the last group too.
constexpr int window_of(int ratio) { return ratio == 4 ? 2 * ratio : ratio; }

// What tells the compressors apart.
template <int head_dim, int ratio>
struct Geometry {
  static constexpr int kHeadDim = head_dim;  // channels of one K entry
  static constexpr int kRatio = ratio;       // positions per entry
  static constexpr int kWindow = window_of(ratio);
  static constexpr bool kOverlap = kWindow > kRatio;
  // With overlap half of it is for the next group's window, half for the row's own.
  static constexpr int kKvWidth = kOverlap ? 2 * kHeadDim : kHeadDim;
  static constexpr int kRowWidth = 2 * kKvWidth;  // a row is [kv | gate]
};
using Indexer = Geometry<128, 4>;
using Main4 = Geometry<512, 4>;
using Main128 = Geometry<512, 128>;

// The indexer's, for code that serves it alone.
constexpr int kHeadDim = Indexer::kHeadDim;
constexpr int kRatio = Indexer::kRatio;
constexpr int kWindow = Indexer::kWindow;
constexpr int kKvWidth = Indexer::kKvWidth;
constexpr int kRowWidth = Indexer::kRowWidth;

constexpr int kRopeDim = 64;         // the last channels, rotated in 32 interleaved pairs
constexpr int kFp8PageEntries = 64;  // an fp8 page: 64 x 128 values, then 64 fp32 scales
constexpr int kFp8ScaleOffset = kFp8PageEntries * kHeadDim;
constexpr float kAmaxMin = 1e-4f;  // keeps the scale of an all-zero entry finite
constexpr float kFp8Max = 448.0f;  // largest e4m3fn
constexpr float kInt8Max = 127.0f;
// An fp8_ds_mla page: of each entry codes and rotated channels, then the exponents of all entries.
constexpr int kDsMlaBlock = 64;  // codes with one scale
constexpr int kDsMlaCodes = Main4::kHeadDim - kRopeDim;
constexpr int kDsMlaBlocks = kDsMlaCodes / kDsMlaBlock;
constexpr int kDsMlaDataBytes = kDsMlaCodes + 2 * kRopeDim;
constexpr int kDsMlaScaleBytes = kDsMlaBlocks + 1;  // the last is zero
constexpr float kDsMlaScaleMin = 1e-4f;

}  // namespace dsv4
