// The tokens of a step, told one by one: positions, requests and slots in global memory.
#pragma once

#include "abi.h"
#include "device.h"
#include "piece.h"

namespace dsv4 {

// A token of the call that may be the source of a row.
struct Candidate {
  int64_t token, position, state_slot;
};

class ListedTokens {
 public:
  __aicore__ inline void Init(TPipe* pipe, const PlanArguments& a) {
    pipe_ = pipe;
    tokens_ = a.tokens;
    positions_gm_.SetGlobalBuffer((__gm__ int64_t*)a.positions);
    requests_gm_.SetGlobalBuffer((__gm__ int32_t*)a.token_to_req);
    state_slots_gm_.SetGlobalBuffer((__gm__ int64_t*)a.state_slots);
    k_slots_gm_.SetGlobalBuffer((__gm__ int64_t*)a.k_slots);
    pipe->InitBuffer(requests_buffer_, (kBefore + kPiece) * sizeof(int32_t));
    pipe->InitBuffer(scanned_buffer_, kScanned * sizeof(int64_t));
    requests_ = requests_buffer_.Get<int32_t>();
    scanned_ = scanned_buffer_.Get<int64_t>();
  }

  // Fills in positions and requests, from the earliest token on, and the slots of the piece's own.
  __aicore__ inline void Fill(Piece& piece) {
    const int64_t first = piece.First(), earliest = piece.Earliest(), end = piece.End();
    Order<HardEvent::S_MTE2>(pipe_);
    Load(piece.At(kPositions, earliest), positions_gm_[earliest], end - earliest);
    Load(requests_, requests_gm_[earliest], end - earliest);
    Load(piece.At(kStateSlots, first), state_slots_gm_[first], end - first);
    Load(piece.At(kKSlots, first), k_slots_gm_[first], end - first);
    Order<HardEvent::MTE2_S>(pipe_);
    for (int64_t token = earliest; token < end; ++token)
      piece.Set(kRequests, token, requests_.GetValue(token - earliest));
  }

  // Next() then finds the tokens of the call at positions [low, high], the last token first.
  __aicore__ inline void Seek(int64_t low, int64_t high) {
    low_ = low, high_ = high;
    next_ = scanned_begin_ = tokens_;
  }

  __aicore__ inline bool Next(Candidate* candidate) {
    while (next_ > 0) {
      if (next_ == scanned_begin_) LoadScanned();
      --next_;
      const int64_t position = scanned_.GetValue(next_ - scanned_begin_);
      if (position < low_ || position > high_) continue;
      *candidate = {next_, position, ReadFresh(state_slots_gm_[next_])};
      return true;
    }
    return false;
  }

 private:
  static constexpr int64_t kScanned = 1024;  // positions that come together

  __aicore__ inline void LoadScanned() {
    const int64_t end = scanned_begin_;
    scanned_begin_ = end > kScanned ? end - kScanned : 0;
    Order<HardEvent::S_MTE2>(pipe_);
    Load(scanned_, positions_gm_[scanned_begin_], end - scanned_begin_);
    Order<HardEvent::MTE2_S>(pipe_);
  }

  template <class T>
  __aicore__ inline void Load(const LocalTensor<T>& target, const GlobalTensor<T>& source,
                              int64_t count) {
    const DataCopyExtParams params(1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0);
    DataCopyPad(target, source, params, DataCopyPadExtParams<T>());
  }

  TPipe* pipe_;
  int64_t tokens_;
  int64_t low_ = 0, high_ = 0, next_ = 0, scanned_begin_ = 0;  // of the search
  GlobalTensor<int64_t> positions_gm_, state_slots_gm_, k_slots_gm_;
  GlobalTensor<int32_t> requests_gm_;
  TBuf<TPosition::VECIN> requests_buffer_, scanned_buffer_;
  LocalTensor<int32_t> requests_;
  LocalTensor<int64_t> scanned_;
};

}  // namespace dsv4
