// The kernels of the two algorithms that one pass (../compress.h) is compared with. Each has two
// launches: one saves the rows, the other pools the windows.
//
// `scatter_pool`: SaveRows, then PoolRows<kFormat, false>. `overlay_scan`: PoolRows<kFormat, true>,
// then SaveRows. In their plan all windows are early, and all sources rows of the state. They serve
// the indexer alone.
#pragma once

#include "../device.h"
#include "../finish.h"
#include "../planned.h"
#include "../pool.h"
#include "../sections.h"
#include "../span.h"
#include "../tile.h"

namespace dsv4 {

class SaveRows {
 public:
  __aicore__ inline void Init(TPipe* pipe, const RunArguments& a, const Tiling& tiling) {
    span_ = OwnSpan(a.tokens, tiling);
    plan_.Init(pipe, a);
    tile_.Init(pipe, a, &plan_);
  }

  __aicore__ inline void Process() {
    if (!plan_.Fits(kStateOnlyLayout)) return;
    for (next_ = plan_.FirstGroup(span_); next_ < span_.end;) {
      tile_.Begin();
      TakeGroups();
      tile_.Arrive();
      for (int f = 0; f < tile_.Frames(); ++f) tile_.Complete(f);
      tile_.Leave();
      tile_.Save();
      tile_.End();
    }
  }

 private:
  __aicore__ inline void TakeGroups() {
    plan_.Hold(next_, span_.end);
    while (next_ < span_.end && tile_.Room() > 0) {
      const int64_t last = plan_.LastOfGroup(next_);
      tile_.AddGroup(next_, last, -1);
      next_ = last + 1;
    }
  }

  Span span_;
  int64_t next_;  // the first token that is in no tile yet
  Planned plan_;
  Tile<Indexer> tile_;
};

// Pools every window from the state; if it overlays, with the rows of this call that a scan over
// all its tokens finds in their places.
template <int64_t kFormat, bool kOverlays>
class PoolRows {
 public:
  __aicore__ inline void Init(TPipe* pipe, const RunArguments& a, const Tiling& tiling) {
    tokens_ = a.tokens;
    span_ = OwnSpan(tokens_, tiling);
    plan_gm_.SetGlobalBuffer((__gm__ int64_t*)a.plan);
    plan_.Init(pipe, a);
    tile_.Init(pipe, a, &plan_);
    finish_.Init(pipe, a);
    pool_.Init(finish_.Scratch());
  }

  __aicore__ inline void Process() {
    if (!plan_.Fits(kStateOnlyLayout)) return;
    for (next_ = plan_.FirstGroup(span_); next_ < span_.end;) {
      tile_.Begin();
      TakeWindows();
      tile_.Arrive();
      PoolWindows();
      tile_.Leave();
      tile_.End();
    }
    finish_.Flush();
  }

 private:
  // Each window takes two frames.
  __aicore__ inline void TakeWindows() {
    while (next_ < span_.end && tile_.Room() > 1) {
      plan_.Hold(next_, span_.end);
      const int64_t last = plan_.LastOfGroup(next_), slot = plan_.KSlot(last);
      next_ = last + 1;
      if (slot < 0) continue;
      tile_.AddPreviousHalves(last);
      tile_.AddOwnHalves(last, slot);
      if constexpr (kOverlays) Overlay(last);
    }
  }

  // Looks at every token of the call for the window that `last` closes, whose frames are the last
  // two.
  __aicore__ inline void Overlay(int64_t last) {
    const int64_t start = plan_.Position(last) - kWindow + 1, request = plan_.Request(last);
    const GlobalTensor<int64_t> positions = plan_gm_[kPlanHeader + kPositions * tokens_];
    const GlobalTensor<int64_t> requests = plan_gm_[kPlanHeader + kRequests * tokens_];
    for (int64_t token = 0; token < tokens_; ++token) {
      const int64_t row = ReadFresh(positions[token]) - start;
      const bool padding = row + start < 0;  // whose request may be any
      if (padding || row < 0 || row >= kWindow || ReadFresh(requests[token]) != request) continue;
      const int in_window = static_cast<int>(row), frame = in_window / kRatio;
      tile_.Replace(tile_.Frames() - 2 + frame, in_window % kRatio, token);
    }
  }

  __aicore__ inline void PoolWindows() {
    for (int f = 0; f < tile_.Frames(); f += 2) {
      const LocalTensor<float> previous = tile_.Complete(f);
      pool_.Take(previous, tile_.Complete(f + 1));
    }
    pool_.PoolTo(finish_.Pooled());
    finish_.Take(tile_);
  }

  int64_t tokens_;
  Span span_;
  int64_t next_;  // the first token that is in no tile yet
  GlobalTensor<int64_t> plan_gm_;
  Planned plan_;
  Tile<Indexer> tile_;
  Pool<Indexer> pool_;
  Finish<Indexer, kFormat> finish_;
};

}  // namespace dsv4
