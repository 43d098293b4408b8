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

int64_t state_rows(const Arguments& a) { return a.state_pages * a.state_page; }
int64_t k_entries(const Arguments& a) { return a.k_pages * a.k_page; }

// The checks of one token, in the order that contract.py documents.
ViolationCode check_token(const Arguments& a, int64_t token) {
  const int64_t slot = a.state_slots[token], k_slot = a.k_slots[token];
  if (!in_range(slot, -1, state_rows(a))) return kStateSlot;
  if (!in_range(k_slot, -1, k_entries(a))) return kKSlot;
  if (slot < 0 && k_slot < 0) return kNoViolation;  // a padding row: its position and request are arbitrary
  if (!in_range(a.positions[token], 0, a.cos_sin_rows)) return kPosition;
  if (!in_range(a.token_to_req[token], 0, a.requests)) return kRequest;
  return kNoViolation;
}

// The checks of the window that `token` closes. `q` is the position that it stopped at, and `in_call` tells whether all
// eight rows are rows of this call.
ViolationCode check_window(const Arguments& a, int64_t token, int64_t& q, bool& in_call) {
  const int64_t position = a.positions[token];
  in_call = position >= kWindow - 1;
  for (q = in_call ? position - kWindow + 1 : 0; q < position; ++q) {
    if (token_at(a, token, q) >= 0) continue;
    in_call = false;
    if (q / a.state_page >= a.table_columns) return kTableColumn;
    if (!in_range(page_of(a, token, q), 1, a.state_pages)) return kTableEntry;
  }
  return kNoViolation;
}

// Whether `token` continues the request of the token before it. Unsigned: the position of a padding row is arbitrary.
bool follows(const Arguments& a, int64_t token) {
  return a.token_to_req[token] == a.token_to_req[token - 1] &&
         static_cast<uint64_t>(a.positions[token]) - static_cast<uint64_t>(a.positions[token - 1]) == 1;
}

// `q` is the window position that a violation of the table is about.
Violation describe(const Arguments& a, ViolationCode code, int64_t token, int64_t q) {
  Violation v{code, token, a.token_to_req[token], a.positions[token], 0, 0, 0};
  switch (code) {
    case kNoViolation: break;
    case kStateSlot: v.value = a.state_slots[token], v.bound = state_rows(a); break;
    case kKSlot: v.value = a.k_slots[token], v.bound = k_entries(a); break;
    case kPosition: v.value = v.position, v.bound = a.cos_sin_rows; break;
    case kRequest: v.value = v.request, v.bound = a.requests; break;
    case kTableColumn: v.needed = q, v.value = q / a.state_page, v.bound = a.table_columns; break;
    case kTableEntry: v.needed = q, v.value = page_of(a, token, q), v.bound = a.state_pages; break;
  }
  return v;
}

// Returns how many entries were written, or -1 if a check (then `violation` says which) or parallel_for failed.
template <Kernel kernel>
int64_t run(const Arguments* arguments, Violation* violation) {
  const Arguments& a = *arguments;
  violation->code = kNoViolation;
  std::vector<int64_t> windows, early;  // tokens that close one
  std::vector<uint8_t> late(a.tokens, 0);
  SlotSet state_slots(a.tokens);
  bool unique = true;
  int64_t run = 0;  // tokens up to this one that are consecutive positions of one request
  for (int64_t token = 0; token < a.tokens; ++token) {
    int64_t q = 0;
    ViolationCode code = check_token(a, token);
    if (a.state_slots[token] >= 0 && code == kNoViolation && state_slots.insert(a.state_slots[token])) unique = false;
    run = token > 0 && follows(a, token) ? run + 1 : 1;
    if (code == kNoViolation && closes_window(a, token)) {
      bool in_call = run >= kWindow && a.positions[token] >= kWindow - 1;
      if (!in_call) code = check_window(a, token, q, in_call);
      windows.push_back(token);
      late[token] = in_call;
    }
    if (code != kNoViolation) {
      *violation = describe(a, code, token, q);
      return -1;
    }
  }
  SlotSet k_slots(windows.size());
  for (const int64_t token : windows)
    if (k_slots.insert(a.k_slots[token])) unique = false;
  for (const int64_t token : windows) {
    late[token] &= unique;
    if (!late[token]) early.push_back(token);
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
