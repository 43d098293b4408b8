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

// Tokens that are worth a thread: about 10 us of work.
template <class G>
constexpr int64_t kGrain = (1 << 16) / G::kRowWidth;

// What the tasks of a call share.
template <class G>
struct Job {
  const LayerCall& call;
  Entry<G::kHeadDim> norm_weight;
};

// The state row of a token: [kv | gate + bias], written front to back. `copy`, if it is asked for,
// goes around the caches.
template <class G, class T, bool copied = false>
void form_row(const LayerCall& call, int64_t token, float* row, float* copy = nullptr) {
  const T* from = kv_score_row<T>(call, token);
  // Padding rows have any position.
  const float* bias =
      call.layer.ape + static_cast<uint64_t>(call.positions[token]) % G::kRatio * G::kKvWidth;
  const auto put = [row, copy](int c, Floats v) {
    store(row + c, v);
    if (copied) store_past_cache(copy + c, v);
  };
  for (int c = 0; c < G::kKvWidth; c += kLanes) put(c, load(from + c));
  for (int c = 0; c < G::kKvWidth; c += kLanes)
    put(G::kKvWidth + c, load(from + G::kKvWidth + c) + load(bias + c));
}

// Rows of this call are formed first, as the state's rows were.
template <class G, class T>
Entry<G::kHeadDim> pool_from_sources(const LayerCall& call, int64_t token) {
  float formed[kTogether][G::kRowWidth];
  Window<G> window;
  for (int first = 0; first < G::kWindow; first += kTogether) {
    Rows rows;
    for (int j = 0; j < kTogether; ++j) {
      const int64_t source = call.sources[token * G::kWindow + first + j];
      const float* row = formed[j];
      if (source >= 0)
        form_row<G, T>(call, source, formed[j]);
      else if (source != kMasked)
        row = state_row(call, row_source(source));
      rows.row[j] = source == kMasked ? kMaskedRow<G>.values : row + half_of_row<G>(first + j);
    }
    window.add(rows);
  }
  return window.entry();
}

template <class G, class T>
void pool_early(int64_t begin, int64_t end, void* context) {
  const Job<G>& job = *static_cast<const Job<G>*>(context);
  Entries<G> entries(job.call, job.norm_weight);
  for (int64_t token = begin; token < end; ++token)
    if (job.call.windows[token] == kEarly)
      entries.add(token, pool_from_sources<G, T>(job.call, token));
  entries.finish();
}

// Saves the rows of a task's tokens, the last few of which are where they were formed: in the
// state, or here.
template <class G, class T, bool past_cache>
class Saved {
 public:
  explicit Saved(const LayerCall& call) : call_(call) {}

  // `slot` -1: only forms the row.
  void save(int64_t token, int64_t slot) {
    float* const saved = slot < 0 ? nullptr : state_row(call_, slot);
    float* const row = past_cache || !saved ? own_[token % kTogether] : saved;
    if (past_cache && saved)
      form_row<G, T, true>(call_, token, row, saved);
    else
      form_row<G, T>(call_, token, row);
    row_[token % kTogether] = row;
  }

  // The rows of the last tokens up to this one, in order.
  Rows rows(int64_t token) const {
    Rows rows;
    for (int j = 0; j < kTogether; ++j)
      rows.row[j] = row_[(token + 1 + j) % kTogether] + half_of_row<G>(j);
    return rows;
  }

 private:
  const LayerCall& call_;
  const float* row_[kTogether] = {};
  alignas(64) float own_[kTogether][G::kRowWidth];
};

// Windows overlap: the first of a task need rows of the task before, which are formed once more.
template <class G, class SavedRows>
void save_and_pool_overlapping(const LayerCall& call, int64_t begin, int64_t end, SavedRows& saved,
                               Entries<G>& entries) {
  static_assert(G::kWindow == kTogether);
  for (int64_t token = begin < G::kWindow ? 0 : begin - G::kWindow + 1; token < end; ++token) {
    saved.save(token, token < begin ? -1 : call.state_slots[token]);
    if (token < begin || call.windows[token] != kLate) continue;
    Window<G> window;
    window.add(saved.rows(token));
    entries.add(token, window.entry());
  }
}

// The first token, from this one on, at which no LATE window that began before it goes on.
template <class G>
int64_t between_windows(const LayerCall& call, int64_t token) {
  const int64_t most = token + G::kWindow - 1, end = most < call.tokens ? most : call.tokens;
  for (int64_t last = token; last < end; ++last)
    if (call.windows[last] == kLate) return last + 1;
  return token;
}

// Windows do not overlap: a task has those that begin among its tokens.
template <class G, class SavedRows>
void save_and_pool_apart(const LayerCall& call, int64_t begin, int64_t end, SavedRows& saved,
                         Entries<G>& entries) {
  for (int64_t token = between_windows<G>(call, begin); token < end;) {
    const int64_t last = token + G::kWindow - 1;
    if (last >= call.tokens || call.windows[last] != kLate) {
      if (call.state_slots[token] >= 0) saved.save(token, call.state_slots[token]);
      ++token;
      continue;
    }
    Window<G> window;
    for (; token <= last; ++token) {
      saved.save(token, call.state_slots[token]);
      if (token % kTogether == last % kTogether) window.add(saved.rows(token));
    }
    entries.add(last, window.entry());
  }
}

// Saves the rows of a task's tokens and pools the windows made of rows of this call, while these
// are still in the nearest cache.
template <class G, class T, bool past_cache>
void save_and_pool(int64_t begin, int64_t end, void* context) {
  const Job<G>& job = *static_cast<const Job<G>*>(context);
  Entries<G> entries(job.call, job.norm_weight);
  Saved<G, T, past_cache> saved(job.call);
  if constexpr (G::kOverlap)
    save_and_pool_overlapping<G>(job.call, begin, end, saved, entries);
  else
    save_and_pool_apart<G>(job.call, begin, end, saved, entries);
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

template <class G, class T>
bool two_phases(const LayerCall& call, bool past_cache) {
  Job<G> job{call, norm_weight<G::kHeadDim>(call.layer)};
  if (!call.unique) {  // in order, so that the last token wins
    pool_early<G, T>(0, call.tokens, &job);
    save_and_pool<G, T, false>(0, call.tokens, &job);
    return true;
  }
  const Task save =
      past_cache ? save_and_pool<G, T, kHasStoresPastCache> : save_and_pool<G, T, false>;
  return (call.early == 0 ||
          call.parallel_for(0, call.tokens, kGrain<G>, pool_early<G, T>, &job) == 0) &&
         call.parallel_for(0, call.tokens, kGrain<G>, save, &job) == 0;
}

template <class G>
bool two_phases(const LayerCall& call, bool past_cache) {
  return call.is_bf16 ? two_phases<G, bfloat16>(call, past_cache)
                      : two_phases<G, float>(call, past_cache);
}

}  // namespace

namespace dsv4::DSV4_ISA {

template <class G>
bool one_pass(const LayerCall& call) {
  return two_phases<G>(call, fits_past_cache(call) && rows_are_cold(call));
}

// With stores around the caches wherever they are possible: the same bits, for tests.
template <class G>
bool one_pass_past_cache(const LayerCall& call) {
  return two_phases<G>(call, fits_past_cache(call));
}

#define DSV4_INSTANTIATE(G)                         \
  template bool one_pass<G>(const LayerCall& call); \
  template bool one_pass_past_cache<G>(const LayerCall& call);
DSV4_INSTANTIATE(Indexer)
DSV4_INSTANTIATE(Main4)
DSV4_INSTANTIATE(Main128)
#undef DSV4_INSTANTIATE

}  // namespace dsv4::DSV4_ISA
