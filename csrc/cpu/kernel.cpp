// Phases 1 and 2 of a call, compiled once per instruction set (DSV4_ISA, DSV4_LANES; see CMakeLists.txt).
//
// Phase 1 pools the windows that read older rows from the state (and the first window of a request), phase 2 saves the
// rows of this call and pools the windows made of them. All history is read before the first row is written, so the
// result does not depend on whether this call overwrites what it reads: rings and recycled pages need no special case,
// and there is no other barrier.

#include <time.h>

#include "entry.h"
#include "plan.h"
#include "window.h"

namespace {

constexpr int64_t kWindowGrain = 32;   // windows, or tokens, that are worth a thread: about 10 us of work
constexpr int64_t kTokenGrain = 128;

struct Call {
  const Arguments& a;
  const Plan& plan;
  Entry norm_weight;
};

// The state row of a token: [kv | gate + bias], written front to back. `copy`, if it is asked for, goes around the caches.
template <class T, bool copied = false>
void form_row(const Arguments& a, int64_t token, float* row, float* copy = nullptr) {
  const T* from = projection<T>(a, token);
  const float* bias = a.ape + static_cast<uint64_t>(a.positions[token]) % kRatio * kKvWidth;  // padding rows: any position
  const auto put = [row, copy](int c, Floats v) {
    store(row + c, v);
    if (copied) store_past_cache(copy + c, v);
  };
  for (int c = 0; c < kKvWidth; c += kLanes) put(c, load(from + c));
  for (int c = 0; c < kKvWidth; c += kLanes) put(kKvWidth + c, load(from + kKvWidth + c) + load(bias + c));
}

// A window with rows from the state or before position 0. Rows of this call are formed first, as the state's rows were.
template <class T>
Entry pool_with_history(const Arguments& a, int64_t token) {
  float formed[kWindow][kRowWidth];
  Window window;
  for (int j = 0; j < kWindow; ++j) {
    const int64_t q = a.positions[token] - kWindow + 1 + j;
    const int64_t u = token_at(a, token, q);
    const float* row = formed[j];
    if (u >= 0)
      form_row<T>(a, u, formed[j]);
    else if (q >= 0)
      row = state_row(a, page_of(a, token, q), q % a.state_page);
    window.row[j] = u < 0 && q < 0 ? kMasked.values : row + half_of_row(j);
  }
  return pool(window);
}

template <class T>
void pool_early(int64_t begin, int64_t end, void* context) {
  const Call& call = *static_cast<const Call*>(context);
  Entries entries(call.a, call.norm_weight);
  for (int64_t i = begin; i < end; ++i)
    entries.add(call.plan.early[i], pool_with_history<T>(call.a, call.plan.early[i]));
  entries.finish();
}

// The last rows of a task, where they were formed: in the state, or here.
struct Recent {
  const float* row[kWindow];
  alignas(64) float own[kWindow][kRowWidth];
};

// Saves the rows of a task's tokens and pools the windows made of rows of this call, while these are still in the
// nearest cache. The first windows need rows of the task before, which are formed once more.
template <class T, bool past_cache>
void save_and_pool(int64_t begin, int64_t end, void* context) {
  const Call& call = *static_cast<const Call*>(context);
  const Arguments& a = call.a;
  Entries entries(a, call.norm_weight);
  Recent recent;
  for (int64_t token = begin < kWindow ? 0 : begin - kWindow + 1; token < end; ++token) {
    const int64_t slot = token < begin ? -1 : a.state_slots[token];
    float* const saved = slot < 0 ? nullptr : state_row(a, slot / a.state_page, slot % a.state_page);
    float* const row = past_cache || !saved ? recent.own[token % kWindow] : saved;
    if (past_cache && saved)
      form_row<T, true>(a, token, row, saved);
    else
      form_row<T>(a, token, row);
    recent.row[token % kWindow] = row;
    if (token < begin || !call.plan.late[token]) continue;
    Window window;
    for (int j = 0; j < kWindow; ++j) window.row[j] = recent.row[(token + 1 + j) % kWindow] + half_of_row(j);
    entries.add(token, pool(window));
  }
  entries.finish();
  if (past_cache) wait_for_stores();
}

// Not std::chrono: see plan.h.
int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000 + now.tv_nsec;
}

// Whether the rows that this call writes are in memory alone, from the time that reading some of them takes one after
// the other. Stores around the caches are then faster by a third or more, and slower where the rows are in a cache.
bool rows_are_cold(const Arguments& a) {
  constexpr int kSamples = 4;
  constexpr int64_t kInCache = 60;  // nanoseconds to read from the last cache, at most; memory takes longer
  volatile const int32_t kNone = 0;
  int32_t seen = 0;
  const int64_t start = nanoseconds();
  for (int i = 0; i < kSamples; ++i) {
    const int64_t slot = a.state_slots[a.tokens * (2 * i + 1) / (2 * kSamples)];
    if (slot < 0) return false;
    seen = bits_of(state_row(a, slot / a.state_page, slot % a.state_page)[seen & kNone]);  // each waits for the last
  }
  volatile const int32_t used = seen;
  (void)used;
  return nanoseconds() - start > kSamples * kInCache;
}

bool goes_past_cache(const Arguments& a) {
  constexpr int64_t kFewTokens = 32;
  const auto aligned = [](int64_t floats) { return floats % kLanes == 0; };
  return a.tokens >= kFewTokens && reinterpret_cast<uintptr_t>(a.state) % sizeof(Floats) == 0 &&
         aligned(a.state_page_stride) && aligned(a.state_row_stride) && rows_are_cold(a);
}

template <class T>
bool run(const Call& call) {
  const Arguments& a = call.a;
  const Plan& plan = call.plan;
  void* context = const_cast<Call*>(&call);
  if (!plan.unique) {  // in order, so that the last token wins
    pool_early<T>(0, plan.early_count, context);
    save_and_pool<T, false>(0, a.tokens, context);
    return true;
  }
  const Task save = goes_past_cache(a) ? save_and_pool<T, true> : save_and_pool<T, false>;
  return a.parallel_for(0, plan.early_count, kWindowGrain, pool_early<T>, context) == 0 &&
         a.parallel_for(0, a.tokens, kTokenGrain, save, context) == 0;
}

}  // namespace

bool dsv4::DSV4_ISA::compress(const Arguments& a, const Plan& plan) {
  const Call call{a, plan, norm_weight(a)};
  return a.kv_score_is_bf16 ? run<bfloat16>(call) : run<float>(call);
}
