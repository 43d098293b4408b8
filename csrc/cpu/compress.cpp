// The exported functions of the op, and phase 0 of a call: check every value, decide which window is pooled when.
// Nothing is written before phase 0 is done. It is serial: a few nanoseconds per token.

#include <cstring>
#include <vector>

#include "baselines.h"
#include "plan.h"
#include "window.h"

namespace dsv4 {
namespace {

// Slots seen so far, eight per key, in an open-addressing table sized by the tokens of the call.
class SlotSet {
 public:
  explicit SlotSet(size_t most) {
    size_t size = 16;
    while (size < 2 * most) size *= 2;
    table_.assign(size, 0);
  }

  // True if the slot was there already. Consecutive slots mostly share a key, which is found once.
  bool insert(int64_t slot) {
    const uint64_t key = static_cast<uint64_t>(slot / 8) + 1;
    const uint64_t bit = 1u << (slot % 8);
    if (entry_ == nullptr || *entry_ >> 8 != key) entry_ = find(key);
    const bool seen = *entry_ & bit;
    *entry_ |= bit;
    return seen;
  }

 private:
  uint64_t* find(uint64_t key) {
    size_t i = key * 0x9E3779B97F4A7C15u >> 20;
    for (;; ++i) {
      uint64_t& entry = table_[i & (table_.size() - 1)];
      if (entry == 0) entry = key << 8;
      if (entry >> 8 == key) return &entry;
    }
  }

  std::vector<uint64_t> table_;
  uint64_t* entry_ = nullptr;
};

bool in_range(int64_t value, int64_t lowest, int64_t end) { return value >= lowest && value < end; }

// The checks of one token, in the order that contract.py documents.
Violation check_token(const Arguments& a, int64_t token) {
  const int64_t slot = a.state_slots[token], k_slot = a.k_slots[token];
  const int64_t request = a.token_to_req[token], position = a.positions[token];
  const auto violation = [&](ViolationCode code, int64_t value, int64_t bound) {
    return Violation{code, token, request, position, 0, value, bound};
  };
  const int64_t state_rows = a.state_pages * a.state_page, k_entries = a.k_pages * a.k_page;
  if (!in_range(slot, -1, state_rows)) return violation(kStateSlot, slot, state_rows);
  if (!in_range(k_slot, -1, k_entries)) return violation(kKSlot, k_slot, k_entries);
  if (slot < 0 && k_slot < 0) return {};  // a padding row: its position and request are arbitrary
  if (!in_range(position, 0, a.cos_sin_rows)) return violation(kPosition, position, a.cos_sin_rows);
  if (!in_range(request, 0, a.requests)) return violation(kRequest, request, a.requests);
  return {};
}

// The checks of the window that `token` closes; `in_call` tells whether all its eight rows are rows of this call.
Violation check_window(const Arguments& a, int64_t token, bool& in_call) {
  const int64_t request = a.token_to_req[token], position = a.positions[token];
  in_call = position >= kWindow - 1;
  for (int64_t q = in_call ? position - kWindow + 1 : 0; q < position; ++q) {
    if (token_at(a, token, q) >= 0) continue;
    in_call = false;
    const int64_t column = q / a.state_page;
    if (column >= a.table_columns) return {kTableColumn, token, request, position, q, column, a.table_columns};
    const int64_t page = page_of(a, token, q);
    if (!in_range(page, 1, a.state_pages)) return {kTableEntry, token, request, position, q, page, a.state_pages};
  }
  return {};
}

// Returns how many entries were written, or -1 if a check (then `violation` says which) or parallel_for failed.
template <Kernel kernel>
int64_t run(const Arguments* arguments, Violation* violation) {
  const Arguments& a = *arguments;
  struct Window {
    int64_t token;
    bool in_call;
  };
  std::vector<Window> windows;
  SlotSet state_slots(a.tokens);
  bool unique = true;
  for (int64_t token = 0; token < a.tokens; ++token) {
    *violation = check_token(a, token);
    if (violation->code) return -1;
    if (a.state_slots[token] >= 0 && state_slots.insert(a.state_slots[token])) unique = false;
    if (!closes_window(a, token)) continue;
    bool in_call;
    *violation = check_window(a, token, in_call);
    if (violation->code) return -1;
    windows.push_back({token, in_call});
  }
  SlotSet k_slots(windows.size());
  for (const Window& w : windows)
    if (k_slots.insert(a.k_slots[w.token])) unique = false;

  std::vector<int64_t> early;
  std::vector<uint8_t> late(a.tokens, 0);
  for (const Window& w : windows) {
    if (w.in_call && unique)
      late[w.token] = 1;
    else
      early.push_back(w.token);
  }
  const Plan plan{early.data(), static_cast<int64_t>(early.size()), late.data(), unique};
  return kernel(a, plan) ? static_cast<int64_t>(windows.size()) : -1;
}

}  // namespace
}  // namespace dsv4

using Entry = int64_t (*)(const dsv4::Arguments*, dsv4::Violation*);

// Whether this build has the kernels of `isa` and this CPU runs them.
static bool usable(const char* isa) {
#if defined(__x86_64__)
  if (!std::strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !std::strcmp(isa, "generic");
}

struct Compressor {
  const char* algorithm;
  const char* isa;
  Entry run;
};

static constexpr Compressor kCompressors[] = {
#if defined(__x86_64__)
    {"one_pass", "avx512", dsv4::run<dsv4::avx512::compress>},
    {"overlay_scan", "avx512", dsv4::run<dsv4::avx512::overlay_scan>},
    {"scatter_pool", "avx512", dsv4::run<dsv4::avx512::scatter_pool>},
    {"one_pass", "avx2", dsv4::run<dsv4::avx2::compress>},
    {"overlay_scan", "avx2", dsv4::run<dsv4::avx2::overlay_scan>},
    {"scatter_pool", "avx2", dsv4::run<dsv4::avx2::scatter_pool>},
#endif
    {"one_pass", "generic", dsv4::run<dsv4::generic::compress>},
    {"overlay_scan", "generic", dsv4::run<dsv4::generic::overlay_scan>},
    {"scatter_pool", "generic", dsv4::run<dsv4::generic::scatter_pool>},
};

// The compressor of that name compiled for `isa`, or null if either is unknown or this CPU lacks the instructions.
extern "C" Entry dsv4_indexer_compress_for(const char* algorithm, const char* isa) {
  for (const Compressor& c : kCompressors)
    if (!std::strcmp(c.algorithm, algorithm) && !std::strcmp(c.isa, isa) && usable(isa)) return c.run;
  return nullptr;
}

// Guards against a library whose struct is not the one that the Python files beside it fill.
extern "C" int64_t dsv4_indexer_arguments_size() { return sizeof(dsv4::Arguments); }
