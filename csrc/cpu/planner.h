// Makes a plan: checks every value of a step, and decides where each window's rows come from.
#pragma once

#include "abi.h"

namespace dsv4 {

// Writes the plan [plan_size(tokens, ratio)] of a ratio that some geometry has, and returns how
// many windows the step closes, or a Failure.
int64_t make_plan(const StepArguments& step, int64_t ratio, Rule rule, int64_t* plan,
                  Violation& violation);

}  // namespace dsv4
