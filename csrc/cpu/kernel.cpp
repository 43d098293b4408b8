// One pass, the product's kernel: one layer of a planned step.
//
// Phase 1 pools the EARLY windows, some of whose rows come from the state or from another request's
// tokens (and the first window of a request). Phase 2 saves the rows of this call and pools the
// LATE windows, which are made of them. All of the state that is read is read before the first row
// is written, so the result does not depend on whether this call overwrites what it reads: rings
// and recycled pages need no special case, and there is no other barrier.

#include <time.h>

#include "entries.h"
#include "probe.h"

namespace {

constexpr int64_t kGrain = 128;  // tokens that are worth a thread: about 10 us of work

// What the tasks of a call share.
struct Job {
  const LayerCall& call;
  Entry norm_weight;
};

// The state row of a token: [kv | gate + bias], written front to back. `copy`, if it is asked for,
// goes around the caches.
template <class T, bool copied = false>
void form_row(const LayerCall& call, int64_t token, float* row, float* copy = nullptr) {
  const T* from = kv_score_row<T>(call, token);
  // Padding rows have any position.
  const float* bias =
      call.layer.ape + static_cast<uint64_t>(call.positions[token]) % kRatio * kKvWidth;
  const auto put = [row, copy](int c, Floats v) {
    store(row + c, v);
    if (copied) store_past_cache(copy + c, v);
  };
  for (int c = 0; c < kKvWidth; c += kLanes) put(c, load(from + c));
  for (int c = 0; c < kKvWidth; c += kLanes)
    put(kKvWidth + c, load(from + kKvWidth + c) + load(bias + c));
}

// Rows of this call are formed first, as the state's rows were.
template <class T>
Entry pool_from_sources(const LayerCall& call, int64_t token) {
  float formed[kWindow][kRowWidth];
  Window window;
  for (int j = 0; j < kWindow; ++j) {
    const int64_t source = call.sources[token * kWindow + j];
    const float* row = formed[j];
    if (source >= 0)
      form_row<T>(call, source, formed[j]);
    else if (source != kMasked)
      row = state_row(call, row_source(source));
    window.row[j] = source == kMasked ? kMaskedRow.values : row + half_of_row(j);
  }
  return pool(window);
}

template <class T>
void pool_early(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<const Job*>(context);
  Entries entries(job.call, job.norm_weight);
  for (int64_t token = begin; token < end; ++token)
    if (job.call.windows[token] == kEarly)
      entries.add(token, pool_from_sources<T>(job.call, token));
  entries.finish();
}

// The last rows of a task, where they were formed: in the state, or here.
struct Recent {
  const float* row[kWindow] = {};
  alignas(64) float own[kWindow][kRowWidth];
};

// Saves the rows of a task's tokens and pools the windows made of rows of this call, while these
// are still in the nearest cache. The first windows need rows of the task before, which are formed
// once more.
template <class T, bool past_cache>
void save_and_pool(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<const Job*>(context);
  const LayerCall& call = job.call;
  Entries entries(call, job.norm_weight);
  Recent recent;
  for (int64_t token = begin < kWindow ? 0 : begin - kWindow + 1; token < end; ++token) {
    const int64_t slot = token < begin ? -1 : call.state_slots[token];
    float* const saved = slot < 0 ? nullptr : state_row(call, slot);
    float* const row = past_cache || !saved ? recent.own[token % kWindow] : saved;
    if (past_cache && saved)
      form_row<T, true>(call, token, row, saved);
    else
      form_row<T>(call, token, row);
    recent.row[token % kWindow] = row;
    if (token < begin || call.windows[token] != kLate) continue;
    Window window;
    for (int j = 0; j < kWindow; ++j)
      window.row[j] = recent.row[(token + 1 + j) % kWindow] + half_of_row(j);
    entries.add(token, pool(window));
  }
  entries.finish();
  if (past_cache) wait_for_stores();
}

// Not std::chrono: see call.h.
int64_t nanoseconds() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000 + now.tv_nsec;
}

// Whether the rows that this call writes are in memory alone. Stores around the caches are then
// faster by a third or more, and slower where the rows are in a cache.
bool rows_are_cold(const LayerCall& call) {
  const float* rows[kSamples];
  for (int i = 0; i < kSamples; ++i) {
    const int64_t slot = call.state_slots[call.tokens * (2 * i + 1) / (2 * kSamples)];
    if (slot < 0) return false;
    rows[i] = state_row(call, slot);
  }
  return memory_is_cold(rows, nanoseconds);
}

bool fits_past_cache(const LayerCall& call) {
  constexpr int64_t kFewTokens = 32;
  const LayerArguments& a = call.layer;
  const auto aligned = [](int64_t floats) { return floats % kLanes == 0; };
  return kHasStoresPastCache && call.tokens >= kFewTokens &&
         reinterpret_cast<uintptr_t>(a.state) % sizeof(Floats) == 0 &&
         aligned(a.state_page_stride) && aligned(a.state_row_stride);
}

template <class T>
bool run(const LayerCall& call, bool past_cache) {
  Job job{call, norm_weight(call.layer)};
  if (!call.unique) {  // in order, so that the last token wins
    pool_early<T>(0, call.tokens, &job);
    save_and_pool<T, false>(0, call.tokens, &job);
    return true;
  }
  const Task save = past_cache ? save_and_pool<T, kHasStoresPastCache> : save_and_pool<T, false>;
  return (call.early == 0 || call.parallel_for(0, call.tokens, kGrain, pool_early<T>, &job) == 0) &&
         call.parallel_for(0, call.tokens, kGrain, save, &job) == 0;
}

bool run(const LayerCall& call, bool past_cache) {
  return call.is_bf16 ? run<bfloat16>(call, past_cache) : run<float>(call, past_cache);
}

}  // namespace

bool dsv4::DSV4_ISA::one_pass(const LayerCall& call) {
  return run(call, fits_past_cache(call) && rows_are_cold(call));
}

// With stores around the caches wherever they are possible: the same bits, for tests.
bool dsv4::DSV4_ISA::one_pass_past_cache(const LayerCall& call) {
  return run(call, fits_past_cache(call));
}
