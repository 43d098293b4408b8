// The kernel of one vector core that plans: for each of its tokens, what is to be written where;
// for each window that is not of consecutive tokens, where its rows come from (the row rule).
//
// `Tokens` tells the step's tokens: ListedTokens reads them, RequestTokens computes them. What the
// tokens themselves do not settle, a row that is not the request's own token of the call, is taken
// from the state at first. Then the core goes once over the tokens of the call, the last one first,
// and claims each row that one of them holds: the same position, and the slot that the table
// gives it. Only a core with such rows does so.
#pragma once

#include "../layout.h"
#include "abi.h"
#include "device.h"
#include "listed.h"
#include "piece.h"
#include "requests.h"
#include "span.h"
#include "table.h"
#include "tiling.h"

namespace dsv4 {

template <class Tokens>
class Planner {
 public:
  __aicore__ inline void Init(TPipe* pipe, const PlanArguments& a, const Tiling& tiling) {
    pipe_ = pipe;
    args_ = a;
    span_ = OwnSpan(a.tokens, tiling);
    plan_gm_.SetGlobalBuffer((__gm__ int64_t*)a.plan);
    table_.Init(a.block_table, a.block_table_stride, a.requests, a.table_columns, a.state_page,
                a.state_pages);
    tokens_.Init(pipe, a);
    piece_.Init(pipe);
    pipe->InitBuffer(header_buffer_, kPlanHeader * sizeof(int64_t));
    pipe->InitBuffer(sources_buffer_, kPiece * kWindow * sizeof(int64_t));
    sources_ = sources_buffer_.template Get<int64_t>();
  }

  __aicore__ inline void Process() {
    if (AscendC::GetBlockIdx() == 0) StoreHeader();
    for (int64_t first = span_.begin; first < span_.end; first += kPiece) {
      Order<HardEvent::MTE3_S>(pipe_);  // the piece before has gone out
      piece_.Begin(first, span_.end - first < kPiece ? span_.end - first : kPiece);
      tokens_.Fill(piece_);
      Decide();
      if (low_ <= high_) Claim();
      Order<HardEvent::S_MTE3>(pipe_);
      piece_.Store(plan_gm_[kPlanHeader], args_.tokens);
      for (int i = 0; i < early_; ++i) StoreSources(early_tokens_[i]);
    }
  }

 private:
  __aicore__ inline void StoreHeader() {
    const LocalTensor<int64_t> header = header_buffer_.template Get<int64_t>();
    for (int i = 0; i < kPlanHeader; ++i) header.SetValue(i, 0);
    header.SetValue(kLayoutPlace, args_.state_only ? kStateOnlyLayout : kPlanLayout);
    header.SetValue(kTokensPlace, args_.tokens);
    header.SetValue(kEntriesPlace, -1);
    header.SetValue(kEarlyPlace, -1);
    header.SetValue(kUniquePlace, 1);  // what the kernels ask of a step (README.md)
    header.SetValue(kSavedPlace, -1);
    header.SetValue(kSharedPlace, -1);
    header.SetValue(kStatePagesPlace, args_.state_pages);
    header.SetValue(kStatePagePlace, args_.state_page);
    header.SetValue(kKEntriesPlace, args_.k_entries);
    header.SetValue(kMaxPosPlace, args_.max_pos);
    Order<HardEvent::S_MTE3>(pipe_);
    DataCopyPad(plan_gm_, header, DataCopyExtParams(1, kPlanHeader * sizeof(int64_t), 0, 0, 0));
  }

  // Settles the piece's tokens, as far as they are told by themselves and the seven before them.
  __aicore__ inline void Decide() {
    early_ = 0;
    low_ = args_.max_pos, high_ = -1;
    int64_t before = 0, request = 0;
    int64_t consecutive = 0;  // positions of one request, up to this token
    for (int64_t token = piece_.Earliest(); token < piece_.End(); ++token) {
      const int64_t position = piece_.Get(kPositions, token), its = piece_.Get(kRequests, token);
      const bool follows =
          consecutive > 0 && its == request && position > 0 && position - 1 == before;
      consecutive = follows ? consecutive + 1 : 1;
      before = position, request = its;
      if (token >= piece_.First()) DecideToken(token, position, request, consecutive);
    }
  }

  __aicore__ inline void DecideToken(int64_t token, int64_t position, int64_t request,
                                     int64_t consecutive) {
    const int64_t row = piece_.Get(kStateSlots, token);
    if (row < args_.state_page || row >= args_.state_pages * args_.state_page)
      piece_.Set(kStateSlots, token, -1);  // page 0 is nobody's
    const bool closes = position % kRatio == kRatio - 1 && position < args_.max_pos;
    const int64_t slot = closes ? piece_.Get(kKSlots, token) : -1;
    const bool stores = slot >= 0 && slot < args_.k_entries;
    const bool late = consecutive >= kWindow && !args_.state_only;
    piece_.Set(kKSlots, token, stores ? slot : -1);
    piece_.Set(kWindows, token, !stores ? kNoWindow : late ? kLate : kEarly);
    if (stores && !late) Trace(token, position, request);
  }

  // Where the rows of the window that `token` closes come from, but for other requests' tokens.
  __aicore__ inline void Trace(int64_t token, int64_t position, int64_t request) {
    for (int row = 0; row < kWindow; ++row) {
      const int64_t back = kWindow - 1 - row, q = position - back;
      int64_t source = kMasked;
      if (q >= 0 && !args_.state_only && Holds(token - back, request, q)) {
        source = token - back;
      } else if (q >= 0) {
        const int64_t slot = table_.Slot(request, q);
        if (slot >= 0) source = kRowZero - slot;
      }
      sources_.SetValue(Place(token) + row, source);
      if (source >= kMasked || args_.state_only) continue;
      low_ = q < low_ ? q : low_;
      high_ = q > high_ ? q : high_;
    }
    early_tokens_[early_++] = token;
  }

  __aicore__ inline bool Holds(int64_t token, int64_t request, int64_t position) const {
    return token >= 0 && piece_.Get(kPositions, token) == position &&
           piece_.Get(kRequests, token) == request;
  }

  // Gives the rows that tokens of this call hold to the last of these. `low_` to `high_` are the
  // positions of all rows that are from the state so far.
  __aicore__ inline void Claim() {
    tokens_.Seek(low_, high_);
    for (Candidate candidate; tokens_.Next(&candidate);)
      for (int i = 0; i < early_; ++i) {
        const int64_t window = early_tokens_[i];
        const int64_t back = piece_.Get(kPositions, window) - candidate.position;
        if (back < 0 || back >= kWindow) continue;
        const int64_t at = Place(window) + kWindow - 1 - back;
        if (candidate.state_slot >= 0 && sources_.GetValue(at) == kRowZero - candidate.state_slot)
          sources_.SetValue(at, candidate.token);
      }
  }

  __aicore__ inline int64_t Place(int64_t token) const {
    return (token - piece_.First()) * kWindow;
  }

  __aicore__ inline void StoreSources(int64_t token) {
    const int64_t to = kPlanHeader + kSections * args_.tokens + token * kWindow;
    DataCopyPad(plan_gm_[to], sources_[Place(token)],
                DataCopyExtParams(1, kWindow * sizeof(int64_t), 0, 0, 0));
  }

  TPipe* pipe_;
  PlanArguments args_;
  Span span_;
  int early_;  // windows of the piece that are pooled early, and their tokens
  int64_t early_tokens_[kPiece];
  int64_t low_, high_;
  Tokens tokens_;
  Piece piece_;
  Table table_;
  GlobalTensor<int64_t> plan_gm_;
  TBuf<TPosition::VECOUT> header_buffer_, sources_buffer_;
  LocalTensor<int64_t> sources_;
};

}  // namespace dsv4
