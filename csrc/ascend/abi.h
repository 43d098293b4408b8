// The C boundary between vllm_dsv4_indexer/ops/ascend.py and this library, and what the kernels are launched with.
// Field for field, ops/arguments.py repeats `Arguments`.
#pragma once

#include <cstdint>

namespace dsv4 {

enum KFormat : int64_t { kInt8Hadamard = 1, kFp8Amax = 2 };  // 0 is the CPU's kFp8Pow2 (cpu/abi.h)

// Addresses are of the device. Strides are in elements of the tensor. A kernel takes this struct by value.
struct Arguments {
  int64_t tokens;                     // T

  uint64_t kv_score;                  // [T, 512] fp32
  int64_t kv_score_stride;
  int64_t kv_score_is_bf16;           // 0: ops/ascend.py refuses bf16
  uint64_t ape;                       // [4, 256] fp32
  uint64_t norm_weight;               // [128] fp32 or bf16
  int64_t norm_weight_is_bf16;
  uint64_t cos_sin;                   // [cos_sin_rows, 64] fp32
  int64_t cos_sin_stride;
  int64_t cos_sin_rows;

  uint64_t positions;                 // [T] int64
  uint64_t token_to_req;              // [T] int32
  uint64_t state_slots;               // [T] int64
  uint64_t block_table;               // [requests, table_columns] int32
  int64_t block_table_stride;
  int64_t requests;
  int64_t table_columns;

  uint64_t state;                     // [state_pages, state_page, 512] fp32
  int64_t state_page_stride;
  int64_t state_row_stride;
  int64_t state_pages;
  int64_t state_page;                 // tokens per page: 2, 4 or 8

  uint64_t k_slots;                   // [T] int64
  uint64_t k_cache;                   // int8: [k_pages, k_page, 128]; fp8: opaque pages of bytes
  int64_t k_page_stride;
  int64_t k_entry_stride;             // fp8: 128
  int64_t k_pages;
  int64_t k_page;                     // entries per page: 32, 64 or 128
  uint64_t k_scale;                   // int8 only: [k_pages, k_page] fp32 or fp16
  int64_t k_scale_page_stride;
  int64_t k_scale_entry_stride;
  int64_t k_scale_is_fp16;

  int64_t k_format;                   // KFormat
  float eps;
};

}  // namespace dsv4

// Both return 0, or write a sentence into `message` and return 1. Nothing waits for the device.
extern "C" {

int64_t dsv4_indexer_ascend_arguments_size();

// `algorithm`: "one_pass"; "overlay_scan" and "scatter_pool" are kept for comparison.
int64_t dsv4_indexer_ascend_compress(const char* algorithm, const dsv4::Arguments* arguments, void* stream,
                                     char* message, int64_t message_size);
}
