// The tokens of a step, told by its requests: where each one's tokens begin, and at which position.
//
// Token u is of the request r with query_start_loc[r] <= u < query_start_loc[r + 1], at position
// start_pos[r] + u - query_start_loc[r]. Its slots follow from the block tables. A token that is no
// request's, or before position 0, writes nothing; neither does one whose number in slot_mapping is
// negative. ops/requests.py has the same as tensor operations.
#pragma once

#include "abi.h"
#include "device.h"
#include "listed.h"
#include "piece.h"
#include "table.h"
#include "tiling.h"

namespace dsv4 {

class RequestTokens {
 public:
  __aicore__ inline void Init(TPipe* pipe, const PlanArguments& a) {
    pipe_ = pipe;
    tokens_ = a.tokens, requests_ = a.requests;
    maps_ = a.slot_mapping != 0, stride_ = a.slot_mapping_stride;
    starts_gm_.SetGlobalBuffer((__gm__ int32_t*)a.query_start_loc);
    positions_gm_.SetGlobalBuffer((__gm__ int32_t*)a.start_pos);
    mapping_gm_.SetGlobalBuffer((__gm__ int32_t*)a.slot_mapping);
    state_table_.Init(a.block_table, a.block_table_stride, requests_, a.table_columns, a.state_page,
                      a.state_pages);
    k_table_.Init(a.k_table, a.k_table_stride, requests_, a.k_columns, a.k_page,
                  a.k_entries / a.k_page);
    pipe->InitBuffer(starts_buffer_, (kHeld + 1) * sizeof(int32_t));
    pipe->InitBuffer(positions_buffer_, kHeld * sizeof(int32_t));
    pipe->InitBuffer(mapping_buffer_, kMostMappingStride * kPiece * sizeof(int32_t));
    starts_ = starts_buffer_.Get<int32_t>();
    positions_ = positions_buffer_.Get<int32_t>();
    mapping_ = mapping_buffer_.Get<int32_t>();
  }

  // As ListedTokens::Fill.
  __aicore__ inline void Fill(Piece& piece) {
    const int64_t first = piece.First(), earliest = piece.Earliest(), end = piece.End();
    if (maps_) LoadMapping(first, end);
    int64_t request = RequestOf(earliest);
    for (int64_t token = earliest; token < end; ++token) {
      while (request < requests_ && EndOf(request) <= token) ++request;
      const int64_t position = request < requests_ ? token + Shift(request) : -1;
      const int64_t row = request < requests_ ? request : requests_ - 1;
      piece.Set(kPositions, token, position < 0 ? 0 : position);
      piece.Set(kRequests, token, row);
      if (token < first) continue;
      const bool excluded = maps_ && mapping_.GetValue((token - first) * stride_) < 0;
      const bool writes = position >= 0 && !excluded;
      const bool closes = writes && position % kRatio == kRatio - 1;
      piece.Set(kStateSlots, token, writes ? state_table_.Slot(row, position) : -1);
      piece.Set(kKSlots, token, closes ? k_table_.Slot(row, position / kRatio) : -1);
    }
  }

  // As ListedTokens::Seek and Next. A request's tokens at other positions are not looked at.
  __aicore__ inline void Seek(int64_t low, int64_t high) {
    low_ = low, high_ = high;
    request_ = requests_;
    end_ = EndOf(requests_ - 1);
    position_ = begin_ = 0;
  }

  __aicore__ inline bool Next(Candidate* candidate) {
    while (position_ <= begin_) {
      if (request_ == 0) return false;
      --request_;
      SeekIn(request_);
    }
    --position_;
    const int64_t token = position_ - shift_;
    const bool writes = !maps_ || ReadFresh(mapping_gm_[token * stride_]) >= 0;
    *candidate = {token, position_, writes ? state_table_.Slot(request_, position_) : -1};
    return true;
  }

 private:
  static constexpr int64_t kHeld = 512;  // requests that come together

  // The first request that ends behind `token`, or how many requests there are.
  __aicore__ inline int64_t RequestOf(int64_t token) {
    int64_t low = 0;
    while (low + kHeld < requests_ && EndOf(low + kHeld - 1) <= token) low += kHeld;
    int64_t high = low + kHeld < requests_ ? low + kHeld : requests_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (EndOf(middle) <= token)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  __aicore__ inline int64_t StartOf(int64_t request) {
    Hold(request);
    return starts_.GetValue(request - held_);
  }
  __aicore__ inline int64_t EndOf(int64_t request) {
    Hold(request);
    return starts_.GetValue(request - held_ + 1);
  }
  // What is to be added to a token of the request to get its position.
  __aicore__ inline int64_t Shift(int64_t request) {
    const int64_t start = StartOf(request);
    return positions_.GetValue(request - held_) - start;
  }

  // Positions [begin_, position_) of the request are now those between low_ and high_ that it has
  // in this call. The request after it, where there is one, was the one before in the search.
  __aicore__ inline void SeekIn(int64_t request) {
    const int64_t start = StartOf(request), first = request == 0 ? 0 : start;
    shift_ = positions_.GetValue(request - held_) - start;
    begin_ = first + shift_ > low_ ? first + shift_ : low_;
    position_ = (end_ < tokens_ ? end_ : tokens_) + shift_;
    position_ = position_ < high_ + 1 ? position_ : high_ + 1;
    end_ = start;
  }

  __aicore__ inline void Hold(int64_t request) {
    if (request >= held_ && request < held_ + kHeld && held_ >= 0) return;
    held_ = request / kHeld * kHeld;
    const int64_t count = held_ + kHeld < requests_ ? kHeld : requests_ - held_;
    Order<HardEvent::S_MTE2>(pipe_);
    Load(starts_, starts_gm_[held_], count + 1);
    Load(positions_, positions_gm_[held_], count);
    Order<HardEvent::MTE2_S>(pipe_);
  }

  __aicore__ inline void LoadMapping(int64_t first, int64_t end) {
    Order<HardEvent::S_MTE2>(pipe_);
    Load(mapping_, mapping_gm_[first * stride_], (end - first - 1) * stride_ + 1);
    Order<HardEvent::MTE2_S>(pipe_);
  }

  __aicore__ inline void Load(const LocalTensor<int32_t>& target,
                              const GlobalTensor<int32_t>& source, int64_t count) {
    const DataCopyExtParams params(1, static_cast<uint32_t>(count * sizeof(int32_t)), 0, 0, 0);
    DataCopyPad(target, source, params, DataCopyPadExtParams<int32_t>());
  }

  TPipe* pipe_;
  int64_t tokens_, requests_, stride_;
  bool maps_;
  int64_t held_ = -1;           // the first request that is here
  int64_t low_ = 0, high_ = 0;  // of the search; then where it is
  int64_t request_ = 0, end_ = 0, begin_ = 0, position_ = 0, shift_ = 0;
  GlobalTensor<int32_t> starts_gm_, positions_gm_, mapping_gm_;
  Table state_table_, k_table_;
  TBuf<TPosition::VECIN> starts_buffer_, positions_buffer_, mapping_buffer_;
  LocalTensor<int32_t> starts_, positions_, mapping_;
};

}  // namespace dsv4
