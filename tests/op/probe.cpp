// csrc/cpu/probe.h with clocks of the tests' own: `probe READING MEMORY` says whether rows that
// take MEMORY nanoseconds each are cold, by a clock whose readings take READING nanoseconds.

#include <cstdio>
#include <cstdlib>

#include "../../csrc/cpu/probe.h"

int main(int, char** argv) {
  const int64_t reading = std::strtoll(argv[1], nullptr, 10),
                memory = std::strtoll(argv[2], nullptr, 10);
  float row[1] = {1.0f};
  const float* const rows[dsv4::kSamples] = {row, row, row, row};
  int64_t now = 0;
  int readings = 0;
  const auto clock = [&] {
    // Between the second and the third lie the rows.
    if (++readings == 3) now += dsv4::kSamples * memory;
    return now += reading;
  };
  std::puts(dsv4::memory_is_cold(rows, clock) ? "cold" : "warm");
}
