// Two more algorithms with the interface of the kernel in plan.h; ops/baselines.py says what they do and where they
// are wrong.
#pragma once

#include "plan.h"

namespace dsv4 {

namespace generic {
void overlay_scan(const Arguments& a, const Plan& plan);
void scatter_pool(const Arguments& a, const Plan& plan);
}  // namespace generic
namespace avx2 {
void overlay_scan(const Arguments& a, const Plan& plan);
void scatter_pool(const Arguments& a, const Plan& plan);
}  // namespace avx2
namespace avx512 {
void overlay_scan(const Arguments& a, const Plan& plan);
void scatter_pool(const Arguments& a, const Plan& plan);
}  // namespace avx512

}  // namespace dsv4
