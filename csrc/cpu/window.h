// Where the rows of a pooling window live. `static`: this header is compiled once per instruction set, and a shared
// inline copy built for AVX-512 could be the one the linker keeps for every CPU.
#pragma once

#include "abi.h"
#include "../layout.h"

namespace dsv4 {

// A token closes a window, and emits an entry, if it ends a group of four and has somewhere to put the entry.
static inline bool closes_window(const Arguments& a, int64_t token) {
  return a.k_slots[token] >= 0 && a.positions[token] % kRatio == kRatio - 1;
}

// The token of this call that holds position `q` of the request of `token`, or -1. Equality alone decides, so that
// rows of other requests and padding rows with arbitrary contents need no special case.
static inline int64_t token_at(const Arguments& a, int64_t token, int64_t q) {
  const int64_t u = token - (a.positions[token] - q);
  const bool in_call = u >= 0 && a.token_to_req[u] == a.token_to_req[token] && a.positions[u] == q;
  return in_call ? u : -1;
}

// The table entry for position `q` of the request of `token`.
static inline int64_t page_of(const Arguments& a, int64_t token, int64_t q) {
  return a.block_table[a.token_to_req[token] * a.block_table_stride + q / a.state_page];
}

static inline float* state_row(const Arguments& a, int64_t page, int64_t row) {
  return a.state + page * a.state_page_stride + row * a.state_row_stride;
}

}  // namespace dsv4
