// Phases 1 and 2 of a call, compiled once per instruction set (DSV4_ISA, DSV4_LANES; see CMakeLists.txt).
//
// Phase 1 pools the windows that read older rows from the state (and the first window of a request), phase 2 saves the
// rows of this call and pools the windows made of them. All history is read before the first row is written, so the
// result does not depend on whether this call overwrites what it reads: rings and recycled pages need no special case,
// and there is no other barrier.

#include "entry.h"
#include "plan.h"
#include "window.h"

namespace {

constexpr int64_t kWindowGrain = 32;   // windows, or tokens, that are worth a thread: about 10 us of work
constexpr int64_t kTokenGrain = 128;
constexpr float kNoBias[kHeadDim] = {};

// A row before position 0: no kv, and a gate that the softmax ignores.
struct MaskedRow {
  float values[kKvWidth + kHeadDim] = {};
  constexpr MaskedRow() {
    for (int c = 0; c < kHeadDim; ++c) values[kKvWidth + c] = -__builtin_inff();
  }
};
constexpr MaskedRow kMasked;

struct Call {
  const Arguments& a;
  const Plan& plan;
  float norm_weight[kHeadDim];
};

template <class T>
const T* projection(const Arguments& a, int64_t token) {
  return static_cast<const T*>(a.kv_score) + token * a.kv_score_stride;
}

// The first four rows of a window lend it their front halves, the last four, its own group, their back halves.
int half_of_row(int j) { return j < kRatio ? 0 : kHeadDim; }

const float* bias(const Arguments& a, int64_t position) { return a.ape + position % kRatio * kKvWidth; }

// The state row of a token: [kv | gate + bias], written front to back.
template <class T>
void form_row(const Arguments& a, int64_t token, float* row) {
  const T* from = projection<T>(a, token);
  const float* gate_bias = bias(a, a.positions[token]);
  for (int c = 0; c < kKvWidth; c += kLanes) store(row + c, load(from + c));
  for (int c = 0; c < kKvWidth; c += kLanes)
    store(row + kKvWidth + c, load(from + kKvWidth + c) + load(gate_bias + c));
}

// A window with rows from the state or before position 0. Rows of this call are formed first, as the state's rows were.
template <class T>
void pool_with_history(const Arguments& a, int64_t token, float* pooled) {
  float formed[kWindow][kRowWidth];
  Row<float> rows[kWindow];
  for (int j = 0; j < kWindow; ++j) {
    const int64_t q = a.positions[token] - kWindow + 1 + j;
    const int64_t u = token_at(a, token, q);
    const float* row = formed[j];
    if (u >= 0) {
      form_row<T>(a, u, formed[j]);
    } else if (q >= 0) {
      row = state_row(a, page_of(a, token, q), q % a.state_page);
    } else {
      rows[j] = {kMasked.values, kNoBias};
      continue;
    }
    rows[j] = {row + half_of_row(j), kNoBias};
  }
  pool(rows, pooled);
}

// A window whose rows are the eight tokens that end with the one that closes it.
template <class T>
void pool_from_call(const Arguments& a, int64_t token, float* pooled) {
  Row<T> rows[kWindow];
  for (int j = 0; j < kWindow; ++j) {
    const int64_t q = a.positions[token] - kWindow + 1 + j;
    rows[j] = {projection<T>(a, token - kWindow + 1 + j) + half_of_row(j), bias(a, q) + half_of_row(j)};
  }
  pool(rows, pooled);
}

template <class T>
void pool_early(int64_t begin, int64_t end, void* context) {
  const Call& call = *static_cast<const Call*>(context);
  for (int64_t i = begin; i < end; ++i) {
    alignas(64) float x[kHeadDim];
    pool_with_history<T>(call.a, call.plan.early[i], x);
    finish_entry(call.a, call.norm_weight, call.plan.early[i], x);
  }
}

template <class T>
void save_and_pool(int64_t begin, int64_t end, void* context) {
  const Call& call = *static_cast<const Call*>(context);
  const Arguments& a = call.a;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t slot = a.state_slots[token];
    if (slot >= 0) form_row<T>(a, token, state_row(a, slot / a.state_page, slot % a.state_page));
    if (!call.plan.late[token]) continue;
    alignas(64) float x[kHeadDim];
    pool_from_call<T>(a, token, x);
    finish_entry(a, call.norm_weight, token, x);
  }
}

template <class T>
bool run(Call& call) {
  const Arguments& a = call.a;
  const Plan& plan = call.plan;
  if (plan.unique) {
    return a.parallel_for(0, plan.early_count, kWindowGrain, pool_early<T>, &call) == 0 &&
           a.parallel_for(0, a.tokens, kTokenGrain, save_and_pool<T>, &call) == 0;
  }
  // In order, so that the last token wins.
  pool_early<T>(0, plan.early_count, &call);
  save_and_pool<T>(0, a.tokens, &call);
  return true;
}

}  // namespace

bool dsv4::DSV4_ISA::compress(const Arguments& a, const Plan& plan) {
  Call call{a, plan, {}};
  for (int c = 0; c < kHeadDim; c += kLanes)
    store(call.norm_weight + c, a.norm_weight_is_bf16 ? load(static_cast<const bfloat16*>(a.norm_weight) + c)
                                                      : load(static_cast<const float*>(a.norm_weight) + c));
  return a.kv_score_is_bf16 ? run<bfloat16>(call) : run<float>(call);
}
