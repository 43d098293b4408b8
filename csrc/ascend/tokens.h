// The metadata of the tokens around the one in hand, in the unified buffer, for the scalar unit.
#pragma once

#include "../layout.h"
#include "abi.h"
#include "device.h"

namespace dsv4 {

class Tokens {
 public:
  __aicore__ inline void Init(TPipe* pipe, const Arguments& a) {
    pipe_ = pipe;
    tokens_ = a.tokens;
    positions_gm_.SetGlobalBuffer((__gm__ int64_t*)a.positions, a.tokens);
    requests_gm_.SetGlobalBuffer((__gm__ int32_t*)a.token_to_req, a.tokens);
    state_slots_gm_.SetGlobalBuffer((__gm__ int64_t*)a.state_slots, a.tokens);
    k_slots_gm_.SetGlobalBuffer((__gm__ int64_t*)a.k_slots, a.tokens);
    pipe->InitBuffer(positions_buffer_, kHeld * sizeof(int64_t));
    pipe->InitBuffer(requests_buffer_, kHeld * sizeof(int32_t));
    pipe->InitBuffer(state_slots_buffer_, kHeld * sizeof(int64_t));
    pipe->InitBuffer(k_slots_buffer_, kHeld * sizeof(int64_t));
    positions_ = positions_buffer_.Get<int64_t>();
    requests_ = requests_buffer_.Get<int32_t>();
    state_slots_ = state_slots_buffer_.Get<int64_t>();
    k_slots_ = k_slots_buffer_.Get<int64_t>();
  }

  // Makes the metadata of tokens [first - 7, first + kAhead) available, as far as they exist. `first` never goes back.
  // Nothing from `end` on will be asked for later.
  __aicore__ inline void Hold(int64_t first, int64_t end) {
    const int64_t needed = first + kAhead < tokens_ ? first + kAhead : tokens_;
    if (needed <= end_) return;
    begin_ = first > kBehind ? first - kBehind : 0;
    end_ = begin_ + kHeld < end ? begin_ + kHeld : end;
    end_ = end_ < tokens_ ? end_ : tokens_;
    Order<HardEvent::S_MTE2>(pipe_);
    CopyIn(positions_, positions_gm_);
    CopyIn(requests_, requests_gm_);
    CopyIn(state_slots_, state_slots_gm_);
    CopyIn(k_slots_, k_slots_gm_);
    Order<HardEvent::MTE2_S>(pipe_);
  }

  __aicore__ inline int64_t Position(int64_t token) const { return positions_.GetValue(token - begin_); }
  __aicore__ inline int32_t Request(int64_t token) const { return requests_.GetValue(token - begin_); }
  __aicore__ inline int64_t StateSlot(int64_t token) const { return state_slots_.GetValue(token - begin_); }
  __aicore__ inline int64_t KSlot(int64_t token) const { return k_slots_.GetValue(token - begin_); }

  // Whether `token` is the one that holds `position` of `request` in this call.
  __aicore__ inline bool Holds(int64_t token, int32_t request, int64_t position) const {
    return token >= 0 && Position(token) == position && Request(token) == request;
  }

  // Whether `token` does not continue the group of four positions of the token before it.
  __aicore__ inline bool BeginsGroup(int64_t token) const {
    const int64_t position = Position(token);
    return position % kRatio == 0 || !Holds(token - 1, Request(token), position - 1);
  }

  static constexpr int64_t kAhead = 4 * kRatio + 1;  // tokens that a tile may look at, and the one after it

 private:
  static constexpr int64_t kBehind = kWindow - 1;  // tokens that a window may look back to
  static constexpr int64_t kHeld = 512;

  template <class T>
  __aicore__ inline void CopyIn(LocalTensor<T>& target, GlobalTensor<T>& source) {
    const DataCopyExtParams params(1, static_cast<uint32_t>((end_ - begin_) * sizeof(T)), 0, 0, 0);
    DataCopyPad(target, source[begin_], params, DataCopyPadExtParams<T>());
  }

  TPipe* pipe_;
  int64_t tokens_ = 0, begin_ = 0, end_ = 0;  // of the call; held
  GlobalTensor<int64_t> positions_gm_, state_slots_gm_, k_slots_gm_;
  GlobalTensor<int32_t> requests_gm_;
  TBuf<TPosition::VECIN> positions_buffer_, requests_buffer_, state_slots_buffer_, k_slots_buffer_;
  LocalTensor<int64_t> positions_, state_slots_, k_slots_;
  LocalTensor<int32_t> requests_;
};

}  // namespace dsv4
