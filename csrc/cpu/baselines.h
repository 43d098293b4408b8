// Two more algorithms with the interface of the kernel in plan.h; ops/baselines.py says what they do and where they
// are wrong.
#pragma once

#include "plan.h"

namespace dsv4 {

namespace generic {
bool overlay_scan(const Arguments& a, const Plan& plan);
bool scatter_pool(const Arguments& a, const Plan& plan);
}  // namespace generic
namespace avx2 {
bool overlay_scan(const Arguments& a, const Plan& plan);
bool scatter_pool(const Arguments& a, const Plan& plan);
}  // namespace avx2
namespace avx512 {
bool overlay_scan(const Arguments& a, const Plan& plan);
bool scatter_pool(const Arguments& a, const Plan& plan);
}  // namespace avx512

}  // namespace dsv4
