// Geometry of the DeepSeek-V4 indexer compressor, shared by every native kernel.
//
// Source: DeepSeek-V4's configuration (index_head_dim 128, qk_rope_head_dim 64, compress ratio 4
// with overlap) and vLLM 0.32's fp8 indexer page. vllm_dsv4_indexer/contract.py holds the same
// numbers for Python; a test compares them.
#pragma once

namespace dsv4 {

constexpr int kHeadDim = 128;            // channels of one K entry
constexpr int kRopeDim = 64;             // its last channels, rotated in 32 interleaved pairs
constexpr int kRatio = 4;                // positions per entry
constexpr int kWindow = 2 * kRatio;      // positions pooled per entry: the last group's, its own
constexpr int kKvWidth = 2 * kHeadDim;   // for the next group's window, and for the row's own
constexpr int kRowWidth = 2 * kKvWidth;  // a row is [kv 256 | gate 256]
constexpr int kFp8PageEntries = 64;      // an fp8 page: 64 x 128 values, then 64 fp32 scales
constexpr int kFp8ScaleOffset = kFp8PageEntries * kHeadDim;
constexpr float kAmaxFloor = 1e-4f;  // keeps the scale of an all-zero entry finite
constexpr float kFp8Max = 448.0f;    // largest e4m3fn
constexpr float kInt8Max = 127.0f;

}  // namespace dsv4
