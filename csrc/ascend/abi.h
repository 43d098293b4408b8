// The C boundary between vllm_dsv4_indexer/ops/ascend.py and this library, and what the kernels are
// launched with. Field for field, ops/ascend.py repeats the structs; a test compares them.
#pragma once

#include <cstdint>

namespace dsv4 {

enum KFormat : int64_t { kInt8Hadamard = 1, kFp8Amax = 2, kBf16 = 3 };  // the CPU's: cpu/abi.h

// Addresses are of the device. Strides are in elements of tensors. Kernels take structs by value.

// What a step's plan is made from. A step tells its tokens (dsv4_indexer_ascend_plan), or its
// requests (dsv4_indexer_ascend_plan_requests); the fields of the other way are 0.
struct PlanArguments {
  int64_t tokens;         // T
  uint64_t positions;     // [T] int64
  uint64_t token_to_req;  // [T] int32
  uint64_t state_slots;   // [T] int64
  uint64_t block_table;   // [requests, table_columns] int32, of the state
  int64_t block_table_stride;
  int64_t requests;  // R
  int64_t table_columns;
  uint64_t k_slots;     // [T] int64
  int64_t state_pages;  // how far the values may reach: contract.Extents
  int64_t state_page;   // tokens per page: 2, 4 or 8
  int64_t k_entries;
  int64_t max_pos;
  uint64_t plan;       // [16 + 13 T] int64, written: ../plan.h
  int64_t state_only;  // 1: all rows from the state, for "overlay_scan" and "scatter_pool"

  uint64_t query_start_loc;  // [R + 1] int32: the first token of each request, and their end
  uint64_t start_pos;        // [R] int32: the position of that token
  uint64_t k_table;          // [R, k_columns] int32
  int64_t k_table_stride;
  int64_t k_columns;
  int64_t k_page;               // entries per page
  uint64_t slot_mapping;        // 0, or [T] int32: a token whose number is negative writes nothing
  int64_t slot_mapping_stride;  // 1 to 4
};

// One layer of a step. What changes from call to call comes first.
struct RunArguments {
  int64_t tokens;     // T
  uint64_t kv_score;  // [T, row width = 4 head_dim] fp32
  int64_t kv_score_stride;
  uint64_t plan;  // [16 + 13 T] int64, of this step

  int64_t head_dim;      // 128, the indexer's, or 512
  int64_t ratio;         // 4
  uint64_t ape;          // [4, 2 head_dim] fp32
  uint64_t norm_weight;  // [head_dim] fp32 or bf16
  int64_t norm_weight_is_bf16;
  uint64_t cos_sin;  // [cos_sin_rows, 64] fp32
  int64_t cos_sin_stride;
  int64_t cos_sin_rows;
  uint64_t state;  // [state_pages, state_page, row width] fp32
  int64_t state_page_stride;
  int64_t state_row_stride;
  int64_t state_pages;
  int64_t state_page;  // tokens per page: 2, 4 or 8
  uint64_t k_cache;    // int8, bf16: [k_pages, k_page, head_dim]; fp8: opaque pages of bytes
  int64_t k_page_stride;
  int64_t k_entry_stride;  // fp8: 128
  int64_t k_pages;
  int64_t k_page;    // entries per page: 32, 64 or 128
  uint64_t k_scale;  // int8 only: [k_pages, k_page] fp32 or fp16
  int64_t k_scale_page_stride;
  int64_t k_scale_entry_stride;
  int64_t k_scale_is_fp16;
  int64_t k_format;  // KFormat
  float eps;
};

enum Outcome : int64_t { kDone = 0, kRefused = 1, kFailed = 2 };

}  // namespace dsv4

// The others return an Outcome, and write a sentence into `message` if it is not kDone: kRefused
// names what is not supported, kFailed what CANN's runtime said of the launch. None waits for the
// device.
extern "C" {

const char* dsv4_indexer_sources();  // the digest of the sources that it was built from

int64_t dsv4_indexer_ascend_plan(const dsv4::PlanArguments* arguments, void* stream, char* message,
                                 int64_t size);
int64_t dsv4_indexer_ascend_plan_requests(const dsv4::PlanArguments* arguments, void* stream,
                                          char* message, int64_t size);

// `algorithm`: "one_pass"; "overlay_scan" and "scatter_pool" are kept for comparison.
int64_t dsv4_indexer_ascend_run(const char* algorithm, const dsv4::RunArguments* arguments,
                                void* stream, char* message, int64_t size);
}
