// Whether some rows are in memory alone, told by the time that it takes to read them.
#pragma once

#include <cstdint>
#include <cstring>

namespace dsv4 {

constexpr int kSamples = 4;
// Nanoseconds to read from the last cache, at most; memory takes longer.
constexpr int64_t kInCache = 60;

// `nanoseconds`: a clock. What a reading of it costs counts for nothing, and where that is more
// than what is measured, the clock tells nothing: ordinary stores are never far from the best.
template <class Clock>
static bool memory_is_cold(const float* const (&rows)[kSamples], Clock nanoseconds) {
  volatile const int32_t kNone = 0;
  int32_t seen = 0;
  const int64_t before = nanoseconds(), start = nanoseconds();
  for (const float* row : rows) {
    const float* const place = row + (seen & kNone);  // each waits for the last
    std::memcpy(&seen, const_cast<const float* volatile&>(place), sizeof seen);
  }
  volatile const int32_t used = seen;
  (void)used;
  const int64_t reading = start - before;
  return reading <= kSamples * kInCache && nanoseconds() - start - reading > kSamples * kInCache;
}

}  // namespace dsv4
