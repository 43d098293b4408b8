// The two algorithms that the one in kernel.cpp replaces, kept to be measured against it; compiled once per
// instruction set. The same checks, threads and arithmetic: only where a window's rows come from, and when the state
// is written, differ.

#include "baselines.h"
#include "entry.h"
#include "window.h"

namespace {

constexpr int64_t kGrain = 128;  // tokens that are worth a thread

struct Call {
  const Arguments& a;
  Entry norm_weight;
};

const float* bias(const Arguments& a, int64_t token) { return a.ape + a.positions[token] % kRatio * kKvWidth; }

template <class T>
void add(const T* values, const float* bias, int width, float* to) {
  for (int c = 0; c < width; c += kLanes) store(to + c, load(values + c) + load(bias + c));
}

template <class T>
void widen(const T* values, int width, float* to) {
  for (int c = 0; c < width; c += kLanes) store(to + c, load(values + c));
}

template <class T>
void save_rows(int64_t begin, int64_t end, void* context) {
  const Arguments& a = static_cast<const Call*>(context)->a;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t slot = a.state_slots[token];
    if (slot < 0) continue;
    const T* from = projection<T>(a, token);
    float* row = state_row(a, slot / a.state_page, slot % a.state_page);
    widen(from, kKvWidth, row);
    add(from + kKvWidth, bias(a, token), kKvWidth, row + kKvWidth);
  }
}

// The part of a row that one window pools, as `pool` wants it: kv at 0, gate at kKvWidth.
struct Half {
  float values[kKvWidth + kHeadDim];
};

// Row j of the window that `token` closes, as the state has it. Phase 0 has checked the pages of history alone, but
// these algorithms look up every row: one without a page is masked.
const float* row_in_state(const Arguments& a, int64_t token, int j) {
  const int64_t q = a.positions[token] - kWindow + 1 + j;
  if (q < 0 || q / a.state_page >= a.table_columns) return kMasked.values;
  const int64_t page = page_of(a, token, q);
  if (page < 1 || page >= a.state_pages) return kMasked.values;
  return state_row(a, page, q % a.state_page) + half_of_row(j);
}

// The chunk of a request: neighbouring tokens at consecutive positions.
struct Chunk {
  int64_t begin, end;
};

Chunk chunk_of(const Arguments& a, int64_t token) {
  const auto same = [&](int64_t u) {
    return a.token_to_req[u] == a.token_to_req[token] && a.positions[u] - u == a.positions[token] - token;
  };
  Chunk chunk{token, token + 1};
  while (chunk.begin > 0 && same(chunk.begin - 1)) --chunk.begin;
  while (chunk.end < a.tokens && same(chunk.end)) ++chunk.end;
  return chunk;
}

template <class T>
Entry pool_with_overlay(const Arguments& a, int64_t token, Chunk chunk) {
  alignas(64) Half window[kWindow];
  for (int j = 0; j < kWindow; ++j) {
    const float* row = row_in_state(a, token, j);
    widen(row, kHeadDim, window[j].values);
    widen(row + kKvWidth, kHeadDim, window[j].values + kKvWidth);
  }
  const int64_t first = a.positions[token] - kWindow + 1;
  for (int64_t u = chunk.begin; u < chunk.end; ++u) {
    const int64_t j = a.positions[u] - first;
    if (j < 0 || j >= kWindow) continue;
    const T* from = projection<T>(a, u) + half_of_row(j);
    widen(from, kHeadDim, window[j].values);
    add(from + kKvWidth, bias(a, u) + half_of_row(j), kHeadDim, window[j].values + kKvWidth);
  }
  Window rows;
  for (int j = 0; j < kWindow; ++j) rows.row[j] = window[j].values;
  return pool(rows);
}

template <class T>
void overlay_and_pool(int64_t begin, int64_t end, void* context) {
  const Call& call = *static_cast<const Call*>(context);
  Entries entries(call.a, call.norm_weight);
  Chunk chunk{0, 0};
  for (int64_t token = begin; token < end; ++token) {
    if (!closes_window(call.a, token)) continue;
    if (token >= chunk.end) chunk = chunk_of(call.a, token);
    entries.add(token, pool_with_overlay<T>(call.a, token, chunk));
  }
  entries.finish();
}

void pool_from_state(int64_t begin, int64_t end, void* context) {
  const Call& call = *static_cast<const Call*>(context);
  Entries entries(call.a, call.norm_weight);
  for (int64_t token = begin; token < end; ++token) {
    if (!closes_window(call.a, token)) continue;
    Window rows;
    for (int j = 0; j < kWindow; ++j) rows.row[j] = row_in_state(call.a, token, j);
    entries.add(token, pool(rows));
  }
  entries.finish();
}

// One pass over all tokens, a barrier, then the other.
bool run(const Arguments& a, const Plan& plan, Task first, Task second) {
  Call call{a, norm_weight(a)};
  if (plan.unique)
    return a.parallel_for(0, a.tokens, kGrain, first, &call) == 0 &&
           a.parallel_for(0, a.tokens, kGrain, second, &call) == 0;
  // In order, so that the last token wins.
  first(0, a.tokens, &call);
  second(0, a.tokens, &call);
  return true;
}

}  // namespace

bool dsv4::DSV4_ISA::overlay_scan(const Arguments& a, const Plan& plan) {
  return a.kv_score_is_bf16 ? run(a, plan, overlay_and_pool<bfloat16>, save_rows<bfloat16>)
                            : run(a, plan, overlay_and_pool<float>, save_rows<float>);
}

bool dsv4::DSV4_ISA::scatter_pool(const Arguments& a, const Plan& plan) {
  return a.kv_score_is_bf16 ? run(a, plan, save_rows<bfloat16>, pool_from_state)
                            : run(a, plan, save_rows<float>, pool_from_state);
}
