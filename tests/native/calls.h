// Calls of the library on memory that is watched, for the programs of this folder.
//
// A call runs with every instruction set that this CPU has, on one thread and on several. Each time
// it has to return and to store the same, and no byte around its arrays may change.
// AddressSanitizer knows the bytes around them, and their contents show what it does not see:
// stores around the caches.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <thread>
#include <vector>

#include "../../csrc/cpu/abi.h"
#include "../../csrc/plan.h"

#ifdef UNDER_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes)
#endif

namespace calls {

using Bytes = std::vector<uint8_t>;

template <class... Args>
void require(bool holds, const char* format, Args... args) {
  if (holds) return;
  if constexpr (sizeof...(args) == 0)
    std::fputs(format, stderr);
  else
    std::fprintf(stderr, format, args...);
  std::fputc('\n', stderr);
  std::abort();
}

// Memory of that size, between margins that nobody may touch.
class Array {
 public:
  explicit Array(size_t size)
      : size_(size),
        whole_((size + 2 * kMargin + 63) / 64 * 64),
        memory_(static_cast<uint8_t*>(std::aligned_alloc(64, whole_))) {
    std::memset(memory_, kUntouched, whole_);
    ASAN_POISON_MEMORY_REGION(memory_, kMargin);
    ASAN_POISON_MEMORY_REGION(data() + size_, whole_ - kMargin - size_);
  }
  explicit Array(const Bytes& bytes) : Array(bytes.size()) {
    std::copy(bytes.begin(), bytes.end(), data());
  }
  Array(const Array&) = delete;
  ~Array() {
    ASAN_UNPOISON_MEMORY_REGION(memory_, whole_);
    require(untouched(memory_, data()) && untouched(data() + size_, memory_ + whole_),
            "bytes around an array of %zu bytes have changed", size_);
    std::free(memory_);
  }

  uint8_t* data() const { return memory_ + kMargin; }
  Bytes bytes() const { return Bytes(data(), data() + size_); }

 private:
  static constexpr size_t kMargin = 2048;
  static constexpr uint8_t kUntouched = 0xa5;

  // The first byte, and each other like the one before.
  static bool untouched(const uint8_t* begin, const uint8_t* end) {
    return *begin == kUntouched && !std::memcmp(begin, begin + 1, end - begin - 1);
  }

  const size_t size_, whole_;
  uint8_t* const memory_;
};

// The start of an array of a call, as a pointer in the call's structs: `run` makes it an address.
inline void* place(size_t array) { return reinterpret_cast<void*>((array + 1) << 32); }

struct Call {
  int64_t head_dim, ratio;
  dsv4::StepArguments step;
  dsv4::LayerArguments layer;
  dsv4::KvScore kv_score;
  std::vector<Bytes> arrays;
};

struct Outcome {
  int64_t planned, stored;
  std::vector<Bytes> arrays;

  bool operator==(const Outcome& o) const {
    return planned == o.planned && stored == o.stored && arrays == o.arrays;
  }
};

// Ways to cut the work. torch's own gives each thread consecutive indices, no fewer than the grain.
using Cut = dsv4::ParallelFor;

inline int32_t by_grain(int64_t begin, int64_t end, int64_t grain, dsv4::Task task, void* context) {
  for (; begin < end; begin += grain) task(begin, std::min(begin + grain, end), context);
  return 0;
}

inline int32_t by_five(int64_t begin, int64_t end, int64_t, dsv4::Task task, void* context) {
  return by_grain(begin, end, 5, task, context);
}

inline int32_t on_four_threads(int64_t begin, int64_t end, int64_t, dsv4::Task task,
                               void* context) {
  const int64_t share = (end - begin + 3) / 4;
  std::vector<std::thread> threads;
  for (; begin < end; begin += share)
    threads.emplace_back(task, begin, std::min(begin + share, end), context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

// Plans and runs `call` on memory of its own.
inline Outcome run(Call call, const char* algorithm, dsv4::Run run, Cut cut) {
  std::vector<std::unique_ptr<Array>> arrays;
  arrays.reserve(call.arrays.size());
  for (const Bytes& bytes : call.arrays) arrays.push_back(std::make_unique<Array>(bytes));
  const auto relocate = [&](auto&... pointer) {
    const auto moved = [&](auto p) {
      const auto at = reinterpret_cast<uintptr_t>(p);
      return at ? reinterpret_cast<decltype(p)>(arrays[(at >> 32) - 1]->data() + (at & 0xffffffff))
                : p;
    };
    ((pointer = moved(pointer)), ...);
  };
  dsv4::StepArguments& s = call.step;
  dsv4::LayerArguments& l = call.layer;
  relocate(s.positions, s.token_to_req, s.state_slots, s.block_table, s.k_slots, l.ape,
           l.norm_weight, l.cos_sin, l.state, l.k_cache, l.k_scale, call.kv_score.rows);

  const int64_t plan_size = dsv4::plan_size(s.tokens, static_cast<int>(call.ratio));
  const Array memory(plan_size * sizeof(int64_t));
  int64_t* const plan = reinterpret_cast<int64_t*>(memory.data());
  const bool one_pass = !std::strncmp(algorithm, "one_pass", 8);
  dsv4::Violation violation;
  Outcome outcome{};
  outcome.arrays.reserve(arrays.size());
  outcome.planned = dsv4_indexer_plan(&s, call.ratio, one_pass ? dsv4::kRowRule : dsv4::kStateOnly,
                                      plan, &violation);
  if (outcome.planned >= 0) outcome.stored = run(&l, cut, plan, &call.kv_score);
  for (const auto& array : arrays) outcome.arrays.push_back(array->bytes());
  return outcome;
}

// The outcome of `call`, which has to be the same however the work is cut and with every
// instruction set that this CPU has.
inline Outcome run_everywhere(const Call& call, const char* algorithm,
                              std::initializer_list<Cut> cuts) {
  std::vector<Outcome> outcomes;
  for (const char* isa : {"generic", "avx2", "avx512"})
    if (const auto compiled = dsv4_indexer_run_for(algorithm, call.head_dim, call.ratio, isa))
      for (const Cut cut : cuts) {
        outcomes.push_back(run(call, algorithm, compiled, cut));
        require(outcomes.back() == outcomes[0], "%s differs with %s", algorithm, isa);
      }
  require(!outcomes.empty(), "no algorithm %s", algorithm);
  return outcomes[0];
}

}  // namespace calls
