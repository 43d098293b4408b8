// One pass, the product's kernel, on one vector core: saves the state rows of its tokens and stores
// the entries that they close.
//
// A core owns the groups of four positions that begin among its tokens, and works through them in
// tiles (tile.h). The rows of a tile come in by MTE2, get the gate's bias, go out again as state
// rows by MTE3, and are pooled in between: no intermediate value leaves the unified buffer. A
// window's first four rows are the frame before its own, which may be the last of the tile before.
// Where that is not in the unified buffer (a request's first window, the first of a core's span), a
// frame is filled with their front halves: rows of this call raw from kv_score, older ones from the
// state, as the step's plan says. No core reads a row that this launch writes; README.md has the
// argument.
#pragma once

#include "budget.h"
#include "finish.h"
#include "planned.h"
#include "pool.h"
#include "span.h"
#include "tile.h"

namespace dsv4 {

template <class G, int64_t kFormat>
class Compress {
  static constexpr int kCarryBytes = kRatio * Previous<G>::kRow * static_cast<int>(sizeof(float));
  static_assert(Planned::kBytes + Tile<G>::kBytes + kCarryBytes + Finish<G, kFormat>::kBytes <=
                kUnifiedBuffer);

 public:
  __aicore__ inline void Init(TPipe* pipe, const RunArguments& a, const Tiling& tiling) {
    span_ = OwnSpan(a.tokens, tiling);
    plan_.Init(pipe, a);
    tile_.Init(pipe, a, &plan_);
    pipe->InitBuffer(carry_buffer_, kCarryBytes);
    carry_ = carry_buffer_.template Get<float>();
    finish_.Init(pipe, a);
    pool_.Init(finish_.Scratch());
  }

  __aicore__ inline void Process() {
    if (!plan_.Fits(kPlanLayout)) return;
    for (next_ = plan_.FirstGroup(span_); next_ < span_.end;) {
      tile_.Begin();
      TakeGroups();
      tile_.Arrive();
      PoolWindows();
      tile_.Leave();
      tile_.Save();
      tile_.End();
    }
    finish_.Flush();
  }

 private:
  // Takes groups from next_ on until the tile is full or the span ends.
  __aicore__ inline void TakeGroups() {
    plan_.Hold(next_, span_.end);
    while (next_ < span_.end && tile_.Room() > 0) {
      const int64_t last = plan_.LastOfGroup(next_), slot = plan_.KSlot(last);
      // A late window's first four rows are the group before it, which this core has, unless it has
      // just begun. What is fetched is in the group's own tile, if a tile can have both.
      const bool fetches = slot >= 0 && !fetched_ && !(full_ && plan_.IsLate(last));
      if (fetches && tile_.Room() == 1 && !Previous<G>::kCarried) break;
      if (fetches) tile_.AddPreviousHalves(last);
      fetched_ = fetches && tile_.Room() == 0;
      if (fetched_) break;  // the group is the next tile's
      tile_.AddGroup(next_, last, slot);
      full_ = last - next_ + 1 == kRatio;
      next_ = last + 1;
    }
  }

  __aicore__ inline void PoolWindows() {
    LocalTensor<float> previous = carry_;
    for (int f = 0; f < tile_.Frames(); ++f) {
      const LocalTensor<float> rows = tile_.Complete(f);
      if (tile_.KSlot(f) >= 0) pool_.Take(previous, rows);
      previous = rows;
    }
    pool_.PoolTo(finish_.Pooled());
    if ((full_ || fetched_) && next_ < span_.end) Carry(previous);
    finish_.Take(tile_);
  }

  // Keeps the front halves of the last frame for the tile to come.
  __aicore__ inline void Carry(const LocalTensor<float>& rows) {
    constexpr int kTo = Previous<G>::kRow / kBlockFloats, kFrom = G::kRowWidth / kBlockFloats;
    for (int part = 0; part < 2; ++part)  // kv and gate
      for (int c = 0; c < G::kHeadDim; c += kLanes)
        Copy(carry_[part * Previous<G>::kGate + c], rows[part * G::kKvWidth + c], kLanes, kRatio,
             {1, 1, kTo, kFrom});
  }

  Span span_;
  int64_t next_;          // the first token that is in no tile yet
  bool full_ = false;     // the last frame holds four tokens of this core
  bool fetched_ = false;  // it holds the halves before the group of next_
  Planned plan_;
  Tile<G> tile_;
  Pool<G> pool_;
  Finish<G, kFormat> finish_;
  TBuf<> carry_buffer_;
  LocalTensor<float> carry_;
};

}  // namespace dsv4
