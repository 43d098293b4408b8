// Overlay scan, and scatter, then pool: the two algorithms that one pass (../kernel.cpp) is
// compared with, for the indexer alone. They have its checks, threads and arithmetic. Only where a
// window's rows come from, and when the state is written, differ. Their plan is kStateOnly: all
// windows are EARLY, all sources rows of the state.

#include "../entries.h"

namespace {

constexpr int64_t kGrain = 128;  // tokens that are worth a thread

struct Job {
  const LayerCall& call;
  Entry<kHeadDim> norm_weight;
};

const float* bias(const LayerCall& call, int64_t token) {
  return call.layer.ape + call.positions[token] % kRatio * kKvWidth;
}

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
  const LayerCall& call = static_cast<const Job*>(context)->call;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t slot = call.state_slots[token];
    if (slot < 0) continue;
    const T* from = kv_score_row<T>(call, token);
    float* row = state_row(call, slot);
    widen(from, kKvWidth, row);
    add(from + kKvWidth, bias(call, token), kKvWidth, row + kKvWidth);
  }
}

// The part of a row that one window pools, as `pool` wants it: kv at 0, gate at kKvWidth.
struct Half {
  float values[kKvWidth + kHeadDim];
};

Entry<kHeadDim> pool(const Rows& rows) {
  Window<Indexer> window;
  window.add(rows);
  return window.entry();
}

// Row j of the window that `token` closes, as the state has it.
const float* row_in_state(const LayerCall& call, int64_t token, int j) {
  const int64_t source = call.sources[token * kWindow + j];
  return source == kMasked ? kMaskedRow<Indexer>.values
                           : state_row(call, row_source(source)) + half_of_row<Indexer>(j);
}

// The chunk of a request: neighbouring tokens at consecutive positions.
struct Chunk {
  int64_t begin, end;
};

Chunk chunk_of(const LayerCall& call, int64_t token) {
  const auto same = [&](int64_t u) {  // unsigned: the position of a padding row is arbitrary
    return call.requests[u] == call.requests[token] &&
           static_cast<uint64_t>(call.positions[u]) - u ==
               static_cast<uint64_t>(call.positions[token]) - token;
  };
  Chunk chunk{token, token + 1};
  while (chunk.begin > 0 && same(chunk.begin - 1)) --chunk.begin;
  while (chunk.end < call.tokens && same(chunk.end)) ++chunk.end;
  return chunk;
}

template <class T>
Entry<kHeadDim> pool_with_overlay(const LayerCall& call, int64_t token, Chunk chunk) {
  alignas(64) Half window[kWindow];
  for (int j = 0; j < kWindow; ++j) {
    const float* row = row_in_state(call, token, j);
    widen(row, kHeadDim, window[j].values);
    widen(row + kKvWidth, kHeadDim, window[j].values + kKvWidth);
  }
  const int64_t first = call.positions[token] - kWindow + 1;
  for (int64_t u = chunk.begin; u < chunk.end; ++u) {
    const int64_t place = call.positions[u] - first;
    if (place < 0 || place >= kWindow || call.positions[u] < 0)
      continue;  // padding has any position
    const int j = static_cast<int>(place);
    const T* from = kv_score_row<T>(call, u) + half_of_row<Indexer>(j);
    widen(from, kHeadDim, window[j].values);
    add(from + kKvWidth, bias(call, u) + half_of_row<Indexer>(j), kHeadDim,
        window[j].values + kKvWidth);
  }
  Rows rows;
  for (int j = 0; j < kWindow; ++j) rows.row[j] = window[j].values;
  return pool(rows);
}

template <class T>
void overlay_and_pool(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<const Job*>(context);
  Entries<Indexer> entries(job.call, job.norm_weight);
  Chunk chunk{0, 0};
  for (int64_t token = begin; token < end; ++token) {
    if (job.call.windows[token] == kNoWindow) continue;
    if (token >= chunk.end) chunk = chunk_of(job.call, token);
    entries.add(token, pool_with_overlay<T>(job.call, token, chunk));
  }
  entries.finish();
}

void pool_from_state(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<const Job*>(context);
  Entries<Indexer> entries(job.call, job.norm_weight);
  for (int64_t token = begin; token < end; ++token) {
    if (job.call.windows[token] == kNoWindow) continue;
    Rows rows;
    for (int j = 0; j < kWindow; ++j) rows.row[j] = row_in_state(job.call, token, j);
    entries.add(token, pool(rows));
  }
  entries.finish();
}

// One pass over all tokens, a barrier, then the other.
bool two_passes(const LayerCall& call, Task first, Task second) {
  Job job{call, norm_weight<kHeadDim>(call.layer)};
  if (call.unique)
    return call.parallel_for(0, call.tokens, kGrain, first, &job) == 0 &&
           call.parallel_for(0, call.tokens, kGrain, second, &job) == 0;
  // In order, so that the last token wins.
  first(0, call.tokens, &job);
  second(0, call.tokens, &job);
  return true;
}

}  // namespace

bool dsv4::DSV4_ISA::overlay_scan(const LayerCall& call) {
  return call.is_bf16 ? two_passes(call, overlay_and_pool<bfloat16>, save_rows<bfloat16>)
                      : two_passes(call, overlay_and_pool<float>, save_rows<float>);
}

bool dsv4::DSV4_ISA::scatter_pool(const LayerCall& call) {
  return call.is_bf16 ? two_passes(call, save_rows<bfloat16>, pool_from_state)
                      : two_passes(call, save_rows<float>, pool_from_state);
}
