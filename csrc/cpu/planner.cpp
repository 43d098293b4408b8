// The checks of a step and its plan, once for all layers. Serial: some nanoseconds per token.

#include "planner.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "../plan.h"

namespace dsv4 {
namespace {

// The last token of each slot, in an open-addressing table.
class LastTokens {
 public:
  // For the slots of at most `most` of the tokens. False: there is no memory.
  bool allocate(const int64_t* slots, uint64_t most) {
    slots_ = slots;
    while (size() < 2 * most) ++bits_;
    table_.reset(static_cast<int64_t*>(std::malloc(size() * sizeof(int64_t))));
    if (table_) std::fill_n(table_.get(), size(), kNone);
    return table_ != nullptr;
  }

  static constexpr int64_t kNone = -1;

  int64_t find(int64_t slot) { return *place(slot); }

  // True if an earlier token has the slot.
  bool insert(int64_t token) {
    int64_t* const found = place(slots_[token]);
    const bool seen = *found != kNone;
    *found = token;
    return seen;
  }

 private:
  size_t size() const { return size_t{1} << bits_; }

  int64_t* place(int64_t slot) {
    size_t i = static_cast<uint64_t>(slot) * 0x9E3779B97F4A7C15u >> (64 - bits_);
    while (table_[i] != kNone && slots_[table_[i]] != slot) i = (i + 1) & (size() - 1);
    return &table_[i];
  }

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  const int64_t* slots_ = nullptr;
  int bits_ = 4;
  std::unique_ptr<int64_t[], Free> table_;
};

bool in_range(int64_t value, int64_t lowest, int64_t end) { return value >= lowest && value < end; }

template <int ratio>
class Planner {
 public:
  Planner(const StepArguments& step, Rule rule, int64_t* plan)
      : a_(step),
        rule_(rule),
        plan_(plan),
        windows_(plan + plan_windows(step.tokens)),
        sources_(plan + plan_sources(step.tokens)) {}

  int64_t make(Violation& violation) {
    violation.code = kNoViolation;
    if (!last_tokens_.allocate(a_.state_slots, a_.tokens)) return kNoMemory;
    int64_t consecutive = 0;  // positions of one request, up to this token
    for (int64_t token = 0; token < a_.tokens; ++token) {
      consecutive = token > 0 && follows(token) ? consecutive + 1 : 1;
      int64_t q = 0;
      ViolationCode code = check_token(token);
      windows_[token] = kNoWindow;
      if (code == kNoViolation && closes_window(token)) code = check_window(token, consecutive, q);
      if (code != kNoViolation) {
        violation = describe(code, token, q);
        return kViolation;
      }
      if (!is_saved(token)) continue;
      ++saved_;
      if (last_tokens_.insert(token)) unique_ = false;
    }
    if (!find_sources()) return kNoMemory;
    write_sections();
    return entries_;
  }

 private:
  static constexpr int kWindow = window_of(ratio);

  int64_t state_rows() const { return a_.state_pages * a_.state_page; }

  // The rows of page 0, the null page, are nobody's.
  bool is_saved(int64_t token) const { return a_.state_slots[token] >= a_.state_page; }

  // A token closes a window, and emits an entry, if it ends a group and has somewhere to put the
  // entry.
  bool closes_window(int64_t token) const {
    return a_.k_slots[token] >= 0 && a_.positions[token] % ratio == ratio - 1;
  }

  // Whether `token` continues the request of the token before it. Unsigned: a padding row's
  // position is arbitrary.
  bool follows(int64_t token) const {
    return a_.token_to_req[token] == a_.token_to_req[token - 1] &&
           static_cast<uint64_t>(a_.positions[token]) -
                   static_cast<uint64_t>(a_.positions[token - 1]) ==
               1;
  }

  // The token of this call that holds position `q` of the request of `token`, or -1. Equality alone
  // decides, so that rows of other requests and padding rows with arbitrary contents need no
  // special case.
  int64_t own_token(int64_t token, int64_t q) const {
    const int64_t u = token - (a_.positions[token] - q);
    const bool own = u >= 0 && a_.token_to_req[u] == a_.token_to_req[token] && a_.positions[u] == q;
    return own ? u : -1;
  }

  // The table entry for position `q` of the request of `token`.
  int64_t page_of(int64_t token, int64_t q) const {
    return a_.block_table[a_.token_to_req[token] * a_.block_table_stride + q / a_.state_page];
  }

  // The checks of one token, in the order that contract.py documents.
  ViolationCode check_token(int64_t token) const {
    const int64_t slot = a_.state_slots[token], k_slot = a_.k_slots[token];
    if (!in_range(slot, -1, state_rows())) return kStateSlot;
    if (!in_range(k_slot, -1, a_.k_entries)) return kKSlot;
    // A padding row: its position and request are arbitrary.
    if (slot < 0 && k_slot < 0) return kNoViolation;
    if (!in_range(a_.positions[token], 0, a_.max_pos)) return kPosition;
    if (!in_range(a_.token_to_req[token], 0, a_.requests)) return kRequest;
    return kNoViolation;
  }

  // The checks of the window that `token` closes, the last of so many consecutive ones. `q` is the
  // position that they stopped at.
  ViolationCode check_window(int64_t token, int64_t consecutive, int64_t& q) {
    const int64_t position = a_.positions[token];
    const bool begins = position >= kWindow - 1;
    bool own = begins;
    if (consecutive < kWindow || !begins)
      for (q = begins ? position - kWindow + 1 : 0; q < position; ++q) {
        if (own_token(token, q) >= 0) continue;
        own = false;
        if (q / a_.state_page >= a_.table_columns) return kTableColumn;
        if (!in_range(page_of(token, q), 1, a_.state_pages)) return kTableEntry;
      }
    windows_[token] = own ? kLate : kEarly;
    ++entries_;
    return kNoViolation;
  }

  // `q` is the window position that a violation of the table is about.
  Violation describe(ViolationCode code, int64_t token, int64_t q) const {
    Violation v{code, token, a_.token_to_req[token], a_.positions[token], 0, 0, 0};
    switch (code) {
      case kNoViolation: break;
      case kStateSlot: v.value = a_.state_slots[token], v.bound = state_rows(); break;
      case kKSlot: v.value = a_.k_slots[token], v.bound = a_.k_entries; break;
      case kPosition: v.value = v.position, v.bound = a_.max_pos; break;
      case kRequest: v.value = v.request, v.bound = a_.requests; break;
      case kTableColumn:
        v.needed = q, v.value = q / a_.state_page, v.bound = a_.table_columns;
        break;
      case kTableEntry: v.needed = q, v.value = page_of(token, q), v.bound = a_.state_pages; break;
    }
    return v;
  }

  // With slots that are not unique every window is pooled before any row is saved, and rows and
  // entries are written in the order of the tokens, so that the last one wins. False: there is no
  // memory.
  bool find_sources() {
    LastTokens entries;
    if (!entries.allocate(a_.k_slots, entries_)) return false;
    for (int64_t token = 0; token < a_.tokens; ++token)
      if (windows_[token] != kNoWindow && entries.insert(token)) unique_ = false;
    for (int64_t token = 0; token < a_.tokens; ++token) {
      if (windows_[token] == kNoWindow) continue;
      if (!unique_ || rule_ == kStateOnly) windows_[token] = kEarly;
      if (windows_[token] == kLate) continue;
      ++early_;
      for (int j = 0; j < kWindow; ++j)
        sources_[token * kWindow + j] = source(token, a_.positions[token] - kWindow + 1 + j);
    }
    return true;
  }

  // The row rule: the request's own token; else any request's token with this position and this
  // state slot; else the state as it was before the call.
  int64_t source(int64_t token, int64_t q) {
    if (q < 0) return kMasked;
    if (rule_ == kStateOnly) return state_source(token, q);
    const int64_t own = own_token(token, q);
    if (own >= 0) return own;
    const int64_t slot = page_of(token, q) * a_.state_page + q % a_.state_page;
    int64_t other = last_tokens_.find(slot);
    while (other >= 0 && (a_.state_slots[other] != slot || a_.positions[other] != q))
      other = unique_ ? -1 : other - 1;  // a slot that occurs twice hides earlier tokens
    shared_ += other >= 0 && a_.token_to_req[other] != a_.token_to_req[token];
    return other >= 0 ? other : row_source(slot);
  }

  // For the baselines, whose rows need no page where the contract asks for none: such a row is
  // masked.
  int64_t state_source(int64_t token, int64_t q) const {
    if (q / a_.state_page >= a_.table_columns) return kMasked;
    const int64_t page = page_of(token, q);
    return in_range(page, 1, a_.state_pages) ? row_source(page * a_.state_page + q % a_.state_page)
                                             : kMasked;
  }

  void write_sections() {
    const int64_t layout = rule_ == kRowRule ? kPlanLayout : kStateOnlyLayout;
    std::fill_n(plan_, kPlanHeader, 0);
    *reinterpret_cast<PlanHeader*>(plan_) = {layout,        a_.tokens,    entries_,  early_,
                                             unique_,       saved_,       shared_,   a_.state_pages,
                                             a_.state_page, a_.k_entries, a_.max_pos};
    std::copy_n(a_.positions, a_.tokens, plan_ + plan_positions(a_.tokens));
    std::copy_n(a_.token_to_req, a_.tokens, plan_ + plan_requests(a_.tokens));
    int64_t* const state_slots = plan_ + plan_state_slots(a_.tokens);
    int64_t* const k_slots = plan_ + plan_k_slots(a_.tokens);
    for (int64_t token = 0; token < a_.tokens; ++token) {
      state_slots[token] = is_saved(token) ? a_.state_slots[token] : -1;
      k_slots[token] = windows_[token] == kNoWindow ? -1 : a_.k_slots[token];
    }
  }

  const StepArguments& a_;
  const Rule rule_;
  int64_t* const plan_;
  int64_t *const windows_, *const sources_;
  LastTokens last_tokens_;
  bool unique_ = true;
  int64_t entries_ = 0, early_ = 0, saved_ = 0, shared_ = 0;
};

}  // namespace

int64_t make_plan(const StepArguments& step, int64_t ratio, Rule rule, int64_t* plan,
                  Violation& violation) {
  return ratio == Main128::kRatio ? Planner<Main128::kRatio>(step, rule, plan).make(violation)
                                  : Planner<Indexer::kRatio>(step, rule, plan).make(violation);
}

}  // namespace dsv4
