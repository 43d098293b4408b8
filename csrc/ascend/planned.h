// What the plan says of the tokens around the one in hand, in the unified buffer.
#pragma once

#include "abi.h"
#include "device.h"
#include "sections.h"
#include "span.h"

namespace dsv4 {

class Planned {
  static constexpr int64_t kAhead = 4 * kRatio + 1;  // tokens that a tile may look at, and the next
  static constexpr int64_t kHeld = 256;
  static constexpr int64_t kSourced = 32;  // tokens whose sources come together: most ask for none

 public:
  static constexpr int64_t kBytes = (kSections * kHeld + kSourced * kWindow) * sizeof(int64_t);

  __aicore__ inline void Init(TPipe* pipe, const RunArguments& a) {
    pipe_ = pipe;
    args_ = a;
    plan_gm_.SetGlobalBuffer((__gm__ int64_t*)a.plan);
    pipe->InitBuffer(sections_buffer_, kSections * kHeld * sizeof(int64_t));
    pipe->InitBuffer(sources_buffer_, kSourced * kWindow * sizeof(int64_t));
    sections_ = sections_buffer_.Get<int64_t>();
    sources_ = sources_buffer_.Get<int64_t>();
  }

  // Whether this is a plan of that layout, of as many tokens, and of no larger caches. Of another
  // step's plan, or one for other caches, nothing is better than anything.
  __aicore__ inline bool Fits(int64_t layout) {
    Load(sources_, plan_gm_, DataCopyExtParams(1, kPlanHeader * sizeof(int64_t), 0, 0, 0));
    return sources_.GetValue(kLayoutPlace) == layout &&
           sources_.GetValue(kTokensPlace) == args_.tokens &&
           sources_.GetValue(kStatePagesPlace) <= args_.state_pages &&
           sources_.GetValue(kStatePagePlace) == args_.state_page &&
           sources_.GetValue(kKEntriesPlace) <= args_.k_pages * args_.k_page &&
           sources_.GetValue(kMaxPosPlace) <= args_.cos_sin_rows;
  }

  // Makes the sections of tokens [first - 1, first + kAhead) available, as far as they exist.
  // `first` never goes back, nor to `end`, the end of the core's span.
  __aicore__ inline void Hold(int64_t first, int64_t end) {
    const int64_t needed = first + kAhead < args_.tokens ? first + kAhead : args_.tokens;
    if (needed <= end_) return;
    begin_ = first > 0 ? first - 1 : 0;
    end_ = begin_ + kHeld < end + kAhead ? begin_ + kHeld : end + kAhead;
    end_ = end_ < args_.tokens ? end_ : args_.tokens;
    const uint32_t bytes = static_cast<uint32_t>((end_ - begin_) * sizeof(int64_t));
    const uint32_t rest = static_cast<uint32_t>((args_.tokens - (end_ - begin_)) * sizeof(int64_t));
    const uint32_t gap = kHeld * sizeof(int64_t) / kBlockBytes - Blocks(bytes);
    const DataCopyExtParams params(kSections, bytes, rest, gap, 0);
    Load(sections_, plan_gm_[kPlanHeader + begin_], params);
  }

  __aicore__ inline int64_t Position(int64_t token) const { return Get(kPositions, token); }
  __aicore__ inline int64_t Request(int64_t token) const { return Get(kRequests, token); }
  __aicore__ inline int64_t StateSlot(int64_t token) const { return Get(kStateSlots, token); }
  __aicore__ inline int64_t KSlot(int64_t token) const { return Get(kKSlots, token); }
  __aicore__ inline bool IsLate(int64_t token) const { return Get(kWindows, token) == kLate; }

  // Where row `row` of the window that `token` closes comes from.
  __aicore__ inline int64_t Source(int64_t token, int row) {
    if (IsLate(token)) return token - kWindow + 1 + row;
    if (token >= sourced_end_) LoadSources(token);
    return sources_.GetValue((token - sourced_begin_) * kWindow + row);
  }

  // Whether `token` does not continue the group of four positions of the token before it.
  __aicore__ inline bool BeginsGroup(int64_t token) const {
    const int64_t position = Position(token);
    return position % kRatio == 0 || token == 0 || Position(token - 1) != position - 1 ||
           Request(token - 1) != Request(token);
  }

  // The first group that begins in the span, or its end. What is left over of a group of the core
  // before is not this one's.
  __aicore__ inline int64_t FirstGroup(const Span& span) {
    Hold(span.begin, span.end);
    int64_t token = span.begin;
    while (token < span.end && !BeginsGroup(token)) ++token;
    return token;
  }

  // The last token of the group that begins with `first`.
  __aicore__ inline int64_t LastOfGroup(int64_t first) const {
    int64_t last = first;
    while (last + 1 < args_.tokens && !BeginsGroup(last + 1)) ++last;
    return last;
  }

 private:
  __aicore__ inline int64_t Get(Section section, int64_t token) const {
    return sections_.GetValue(section * kHeld + token - begin_);
  }

  __aicore__ inline void LoadSources(int64_t token) {
    sourced_begin_ = token;
    sourced_end_ = token + kSourced < end_ ? token + kSourced : end_;
    const int64_t at = kPlanHeader + kSections * args_.tokens + token * kWindow;
    const int64_t count = (sourced_end_ - sourced_begin_) * kWindow;
    const uint32_t bytes = static_cast<uint32_t>(count * sizeof(int64_t));
    Load(sources_, plan_gm_[at], DataCopyExtParams(1, bytes, 0, 0, 0));
  }

  __aicore__ inline void Load(const LocalTensor<int64_t>& target,
                              const GlobalTensor<int64_t>& source,
                              const DataCopyExtParams& params) {
    Order<HardEvent::S_MTE2>(pipe_);
    DataCopyPad(target, source, params, DataCopyPadExtParams<int64_t>());
    Order<HardEvent::MTE2_S>(pipe_);
  }

  TPipe* pipe_;
  RunArguments args_;
  int64_t begin_ = 0, end_ = 0;                  // tokens whose sections are here
  int64_t sourced_begin_ = 0, sourced_end_ = 0;  // and whose sources
  GlobalTensor<int64_t> plan_gm_;
  TBuf<TPosition::VECIN> sections_buffer_, sources_buffer_;
  LocalTensor<int64_t> sections_, sources_;
};

}  // namespace dsv4
