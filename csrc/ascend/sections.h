// The plan (../plan.h) for code that runs on a core, which can call none of that file's functions.
#pragma once

#include <cstddef>

#include "../plan.h"

namespace dsv4 {

// In the order in which a plan has them, a number per token each; behind them the sources.
enum Section { kPositions, kRequests, kStateSlots, kKSlots, kWindows, kSections };
static_assert(plan_positions(9) == kPlanHeader + 9 * kPositions);
static_assert(plan_requests(9) == kPlanHeader + 9 * kRequests);
static_assert(plan_state_slots(9) == kPlanHeader + 9 * kStateSlots);
static_assert(plan_k_slots(9) == kPlanHeader + 9 * kKSlots);
static_assert(plan_windows(9) == kPlanHeader + 9 * kWindows);
static_assert(plan_sources(9) == kPlanHeader + 9 * kSections);

// The state row `slot` is the source kRowZero - slot, and back.
constexpr int64_t kRowZero = row_source(0);
static_assert(row_source(9) == kRowZero - 9);

// Where the header has a number.
#define DSV4_PLACE(FIELD) offsetof(PlanHeader, FIELD) / sizeof(int64_t)
enum HeaderPlace : int {
  kLayoutPlace = DSV4_PLACE(layout),
  kTokensPlace = DSV4_PLACE(tokens),
  kEntriesPlace = DSV4_PLACE(entries),
  kEarlyPlace = DSV4_PLACE(early),
  kUniquePlace = DSV4_PLACE(unique),
  kSavedPlace = DSV4_PLACE(saved),
  kSharedPlace = DSV4_PLACE(shared),
  kStatePagesPlace = DSV4_PLACE(state_pages),
  kStatePagePlace = DSV4_PLACE(state_page),
  kKEntriesPlace = DSV4_PLACE(k_entries),
  kMaxPosPlace = DSV4_PLACE(max_pos),
};
#undef DSV4_PLACE

}  // namespace dsv4
