// What phase 0 hands to the kernels, and the kernels themselves: one per instruction set.
#pragma once

#include "abi.h"

namespace dsv4 {

// Plain pointers: the kernels are compiled for newer CPUs and must not instantiate the standard library.
struct Plan {
  const int64_t* early;      // tokens whose windows are pooled before any state row is written, ascending
  int64_t early_count;
  const uint8_t* late;       // [T] 1: this token closes a window whose eight rows are all rows of this call
  bool unique;               // no slot occurs twice, so that tokens may be written in any order
};

using Kernel = bool (*)(const Arguments& a, const Plan& plan);  // false: parallel_for failed

namespace generic { bool compress(const Arguments& a, const Plan& plan); }
namespace avx2 { bool compress(const Arguments& a, const Plan& plan); }
namespace avx512 { bool compress(const Arguments& a, const Plan& plan); }

}  // namespace dsv4
