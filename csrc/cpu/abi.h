// The C boundary between vllm_dsv4_indexer/ops/cpu.py and this library. Field for field,
// ops/arguments.py repeats the structs; a test compares names, order and widths.
#pragma once

#include <cstdint>

namespace dsv4 {

// torch's intra-op pool, as libtorch_cpu's stable C shim exports it (`torch_parallel_for`, torch
// >= 2.10). Passed in as a pointer, so that this library links to neither torch nor a second OpenMP
// runtime.
using Task = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Task task,
                                void* context);

enum KFormat : int64_t { kFp8Pow2 = 0, kInt8Hadamard = 1, kFp8DsMla = 2, kBf16 = 3 };

// Where the plan looks for rows that are not a request's own tokens. kStateOnly is for the
// baselines, whose windows come from the state alone.
enum Rule : int64_t { kRowRule = 0, kStateOnly = 1 };

// What a plan is made from. Strides are in elements of the tensor.
struct StepArguments {
  int64_t tokens;               // T
  const int64_t* positions;     // [T]
  const int32_t* token_to_req;  // [T]
  const int64_t* state_slots;   // [T]
  const int32_t* block_table;   // [requests, table_columns]
  int64_t block_table_stride;
  int64_t requests;
  int64_t table_columns;
  const int64_t* k_slots;  // [T]
  int64_t state_pages;
  int64_t state_page;  // tokens per page
  int64_t k_entries;
  int64_t max_pos;
};

// A layer's weights and caches.
struct LayerArguments {
  const float* ape;         // [ratio, kv width]
  const void* norm_weight;  // [head_dim] fp32 or bf16
  int64_t norm_weight_is_bf16;
  const float* cos_sin;  // [cos_sin_rows, 64]
  int64_t cos_sin_stride;
  int64_t cos_sin_rows;
  float* state;  // [state_pages, state_page, row width]
  int64_t state_page_stride;
  int64_t state_row_stride;
  int64_t state_pages;
  int64_t state_page;
  void* k_cache;  // fp8: opaque pages of bytes; int8, bf16: [k_pages, k_page, head_dim]
  int64_t k_page_stride;
  int64_t k_entry_stride;  // int8 and bf16
  int64_t k_pages;
  int64_t k_page;  // entries per page
  void* k_scale;   // int8 only: [k_pages, k_page] fp32 or fp16
  int64_t k_scale_page_stride;
  int64_t k_scale_entry_stride;
  int64_t k_scale_is_fp16;
  int64_t k_format;  // KFormat
  double eps;
};

// The projection, [tokens, row width], fp32 or bf16.
struct KvScore {
  const void* rows;
  int64_t stride;
  int64_t is_bf16;
  int64_t tokens;
};

// What the checks found; contract.py has the sentence for each code.
enum ViolationCode : int64_t {
  kNoViolation = 0,
  kStateSlot = 1,
  kKSlot = 2,
  kPosition = 3,
  kRequest = 4,
  kTableColumn = 5,
  kTableEntry = 6,
};

struct Violation {
  int64_t code;
  int64_t token;
  int64_t request;
  int64_t position;
  int64_t needed;  // the window position that a table violation is about
  int64_t value;
  int64_t bound;
};

// What a function returns instead of a count.
enum Failure : int64_t {
  kViolation = -1,       // of the step's values; `violation` says which
  kThreadsFailed = -2,   // parallel_for did: the caches may be half written
  kNoMemory = -3,        // for the plan's look-up; nothing was written
  kPlanDoesNotFit = -4,  // the layer or the tokens; nothing was written
};

// Runs a planned layer. Returns how many entries were written, or a Failure.
using Run = int64_t (*)(const LayerArguments*, ParallelFor, const int64_t* plan, const KvScore*);

}  // namespace dsv4

extern "C" {

// Returns how many windows the step closes, or a Failure. `plan` is [plan_size(T, ratio)]: plan.h.
int64_t dsv4_indexer_plan(const dsv4::StepArguments* step, int64_t ratio, int64_t rule,
                          int64_t* plan, dsv4::Violation* violation);

// The algorithm of that name for a compressor, compiled for `isa` ("avx512", "avx2" or "generic"),
// or null if there is none or this CPU lacks the instructions. "one_pass" is the product's;
// "one_pass_past_cache" always stores around the caches; "floor" and "floor_past_cache" are for
// comparison, and so are, for the indexer alone and on a plan of kStateOnly, "overlay_scan" and
// "scatter_pool".
dsv4::Run dsv4_indexer_run_for(const char* algorithm, int64_t head_dim, int64_t ratio,
                               const char* isa);

// out [tokens, 512] = x [tokens, hidden] * weight^T, on a CPU that has the instructions (x86-64
// alone), for at least one token; projection.cpp says how the weight is packed. Returns 0, or what
// parallel_for returned.
int32_t dsv4_indexer_project(dsv4::ParallelFor parallel_for, const uint16_t* x, int64_t x_stride,
                             int64_t tokens, int64_t hidden, const uint16_t* packed, float* out);

// 0: this CPU lacks the instructions. 1: it has them. 2: and they do more products in the same time
// than fp32 multiply-adds: on AMD's CPUs twice as many, on Intel's half as many.
int32_t dsv4_indexer_bf16_dot();

// The digest of the sources that the library was built from (CMakeLists.txt), which ops/library.py
// compares.
const char* dsv4_indexer_sources();
}
