// A plan: what one step has decided for all its layers. vllm_dsv4_indexer/contract.py has the same
// in Python, with what each section means; a test compares them.
//
// One array of int64: a header, then sections of one number per token, then for each token as many
// sources as a window has rows. Only EARLY windows have sources; elsewhere the section is not
// touched, so that it takes addresses, not memory.
#pragma once

#include <cstdint>

#include "layout.h"

namespace dsv4 {

constexpr int64_t kPlanLayout = 0x4453563401;
constexpr int64_t kStateOnlyLayout =
    -kPlanLayout;                 // a plan for the baselines: all sources are rows of the state
constexpr int kPlanHeader = 16;   // numbers, of which PlanHeader names the first
constexpr int kPlanSections = 5;  // with one number per token, before the sources
constexpr int64_t kNoWindow = 0;
constexpr int64_t kEarly = 1;    // pooled before any row is saved
constexpr int64_t kLate = 2;     // its rows are consecutive tokens of this call
constexpr int64_t kMasked = -1;  // a source that does not exist

constexpr int64_t row_source(int64_t slot) { return -2 - slot; }  // the state row `slot`, and back

struct PlanHeader {
  int64_t layout;       // kPlanLayout
  int64_t tokens;       // T
  int64_t entries;      // windows that the step closes; -1 if only the device knows
  int64_t early;        // how many of them are kEarly; -1 if only the device knows
  int64_t unique;       // no slot occurs twice, so that tokens may be written in any order
  int64_t saved;        // tokens whose row is saved; -1 if only the device knows
  int64_t shared;       // rows of windows that another request's token holds; -1 likewise
  int64_t state_pages;  // the extents that the step was planned for
  int64_t state_page;
  int64_t k_entries;
  int64_t max_pos;
};

// In int64.
constexpr int64_t plan_size(int64_t tokens, int ratio) {
  return kPlanHeader + (kPlanSections + window_of(ratio)) * tokens;
}

// Where the sections begin, in int64 from the header.
constexpr int64_t plan_positions(int64_t) { return kPlanHeader; }
constexpr int64_t plan_requests(int64_t tokens) { return kPlanHeader + tokens; }
constexpr int64_t plan_state_slots(int64_t tokens) { return kPlanHeader + 2 * tokens; }
constexpr int64_t plan_k_slots(int64_t tokens) { return kPlanHeader + 3 * tokens; }
constexpr int64_t plan_windows(int64_t tokens) { return kPlanHeader + 4 * tokens; }
constexpr int64_t plan_sources(int64_t tokens) { return kPlanHeader + 5 * tokens; }

}  // namespace dsv4
