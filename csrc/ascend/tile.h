// A tile: a few frames of rows in the unified buffer. A frame holds the rows of a group of four
// positions, or those of their halves that a window pools.
//
// Whole rows are of the core's own tokens: they come from kv_score and go out again as state rows.
// Halves complete a window: they come from kv_score or from the state, as the step's plan says.
#pragma once

#include "../layout.h"
#include "abi.h"
#include "budget.h"
#include "device.h"
#include "paging.h"
#include "planned.h"
#include "pool.h"

namespace dsv4 {

template <class G>
class Tile {
  static constexpr int kTileBytes =
      Budget<G>::kFrames * (kFrameFloats<G> + kRopeDim) * static_cast<int>(sizeof(float));
  static constexpr int kBiasBytes = kRatio * G::kKvWidth * static_cast<int>(sizeof(float));

 public:
  static constexpr int64_t kBytes = Budget<G>::kTiles * kTileBytes + kBiasBytes;

  __aicore__ inline void Init(TPipe* pipe, const RunArguments& a, Planned* plan) {
    args_ = a;
    plan_ = plan;
    kv_score_gm_.SetGlobalBuffer((__gm__ float*)a.kv_score);
    state_gm_.SetGlobalBuffer((__gm__ float*)a.state);
    cos_sin_gm_.SetGlobalBuffer((__gm__ float*)a.cos_sin);
    paging_.Init(a.state_page);
    pipe->InitBuffer(queue_, Budget<G>::kTiles, kTileBytes);
    pipe->InitBuffer(bias_buffer_, kBiasBytes);
    bias_ = bias_buffer_.Get<float>();
    LoadBias();
  }

  // A tile's life: it begins empty, gets frames, its rows arrive, are completed, leave, and may be
  // saved before it ends.
  __aicore__ inline void Begin() {
    used_ = windows_ = 0;
    rows_ = queue_.AllocTensor<float>();
  }
  __aicore__ inline void Arrive() {
    LoadRows();
    LoadCosSin();
    queue_.EnQue<TPosition::GM, TPosition::VECIN, float>(rows_);
    rows_ = queue_.DeQue<TPosition::GM, TPosition::VECIN, float>();
  }
  __aicore__ inline void Leave() {
    queue_.EnQue<TPosition::VECOUT, TPosition::GM, float>(rows_);
    rows_ = queue_.DeQue<TPosition::VECOUT, TPosition::GM, float>();
  }
  __aicore__ inline void End() { queue_.FreeTensor(rows_); }

  __aicore__ inline int Frames() const { return used_; }
  __aicore__ inline int Room() const { return Budget<G>::kFrames - used_; }

  // Adds the group of tokens [first, last], whole. `slot`: of the entry of the window that `last`
  // closes, or -1. If there is one, the positions of the group before `first` are added for it.
  __aicore__ inline void AddGroup(int64_t first, int64_t last, int64_t slot) {
    const int64_t position = plan_->Position(first);
    const int row = static_cast<int>(position & (kRatio - 1));
    const int rows = static_cast<int>(last - first + 1);
    frames_[used_] = {first, row, rows, G::kHeadDim, ((1 << rows) - 1) << row, 0, slot};
    if (slot >= 0) Fetch(last, kRatio, row);
    if (slot >= 0) starts_[windows_++] = position - row;
    ++used_;
  }

  // Adds the halves of four rows of the window that `last` closes: of the group before its own, or
  // of its own, whose entry has that slot.
  __aicore__ inline void AddPreviousHalves(int64_t last) {
    frames_[used_] = {last, 0, 0, 0, 0, 0, -1};
    Fetch(last, 0, kRatio);
    ++used_;
  }
  __aicore__ inline void AddOwnHalves(int64_t last, int64_t slot) {
    frames_[used_] = {last, 0, 0, G::kHeadDim, 0, 0, slot};
    Fetch(last, kRatio, kRatio);
    starts_[windows_++] = plan_->Position(last) - kRatio + 1;
    ++used_;
  }

  // Puts the half of a token's row in the place of the one that frame f has.
  __aicore__ inline void Replace(int f, int row, int64_t token) {
    AscendC::PipeBarrier<PIPE_MTE2>();
    FetchStretch(f, {true, token * args_.kv_score_stride, row, 1});
    frames_[f].raw |= 1 << row;
    frames_[f].absent &= ~(1 << row);
  }

  // The rows of frame f, with the bias added and absent ones weightless.
  __aicore__ inline LocalTensor<float> Complete(int f) {
    const Frame& frame = frames_[f];
    const LocalTensor<float> rows = rows_[f * kFrameFloats<G>];
    for (int row = 0; row < kRatio; ++row) {
      const LocalTensor<float> kv = rows[row * G::kRowWidth], gate = kv[G::kKvWidth],
                               bias = bias_[row * G::kKvWidth];
      const bool whole = row >= frame.row && row < frame.row + frame.rows;
      const int at = whole ? 0 : frame.half, width = whole ? G::kKvWidth : G::kHeadDim;
      if (frame.raw >> row & 1) Add(gate[at], gate[at], bias[at], width);
      if (frame.absent >> row & 1) {
        Duplicate(kv[at], 0.0f, width);
        Duplicate(gate[at], kWeightless, width);
      }
    }
    return rows;
  }

  // The slot of the entry of the window that ends with frame f, or -1.
  __aicore__ inline int64_t KSlot(int f) const { return frames_[f].k_slot; }

  // How many windows end here, and the cosines and sines of window w.
  __aicore__ inline int Windows() const { return windows_; }
  __aicore__ inline LocalTensor<float> CosSin(int w) const {
    return rows_[Budget<G>::kFrames * kFrameFloats<G> + w * kRopeDim];
  }

  // Saves the whole rows. Where neighbours in the tile are neighbours in a page, they go together.
  __aicore__ inline void Save() {
    int64_t slot = 0;
    int row = 0, rows = 0;
    for (int f = 0; f < used_; ++f) {
      const Frame& frame = frames_[f];
      for (int i = 0; i < frame.rows; ++i) {
        const int64_t to = plan_->StateSlot(frame.token + i);
        const int from = f * kRatio + frame.row + i;
        if (rows > 0 && from == row + rows && to == slot + rows && paging_.InPage(to) != 0) {
          ++rows;
          continue;
        }
        if (rows > 0) SaveStretch(slot, row, rows);
        slot = to, row = from, rows = to >= 0;
      }
    }
    if (rows > 0) SaveStretch(slot, row, rows);
  }

 private:
  static constexpr int kHalfBytes = G::kHeadDim * sizeof(float);
  static constexpr float kWeightless = -3e38f;  // a gate whose weight is 0 beside any other

  struct Frame {
    int64_t token;   // of the first row that is a token's
    int row, rows;   // rows [row, row + rows) are whole, of tokens of this core
    int half;        // where the channels of the other rows begin
    int raw;         // bits: rows that came from kv_score and lack the bias
    int absent;      // bits: rows that do not exist
    int64_t k_slot;  // of the entry of the window that ends here, or -1
  };

  // Rows of a frame that lie together in kv_score, raw, or in the state: `at` is where, in
  // elements.
  struct Stretch {
    bool raw;
    int64_t at;
    int row, rows;
  };

  // The first tile arrives after it.
  __aicore__ inline void LoadBias() {
    GlobalTensor<float> gm;
    gm.SetGlobalBuffer((__gm__ float*)args_.ape, kRatio * G::kKvWidth);
    DataCopyPad(bias_, gm, DataCopyExtParams(1, kBiasBytes, 0, 0, 0),
                DataCopyPadExtParams<float>());
  }

  // Loads the windows' cosines and sines. Those of windows in a row come together.
  __aicore__ inline void LoadCosSin() {
    const int64_t stride = args_.cos_sin_stride;
    const uint32_t gap = static_cast<uint32_t>((kRatio * stride - kRopeDim) * sizeof(float));
    for (int w = 0, end = 0; w < windows_; w = end) {
      for (end = w + 1; end < windows_ && starts_[end] == starts_[end - 1] + kRatio;) ++end;
      CopyRows(CosSin(w), cos_sin_gm_[starts_[w] * stride], end - w, kRopeDim * sizeof(float), gap,
               0);
    }
  }

  // Fills rows [0, rows) of the next frame, which are rows `first` and on of the window of `last`,
  // with the halves that it pools. What lies together in memory comes together.
  __aicore__ inline void Fetch(int64_t last, int first, int rows) {
    Stretch stretch = {false, 0, 0, 0};
    for (int row = 0; row < rows; ++row) {
      const int64_t source = plan_->Source(last, first + row);
      if (source == kMasked) {
        frames_[used_].absent |= 1 << row;
        continue;
      }
      const bool raw = source >= 0;
      const int64_t at = raw ? source * args_.kv_score_stride : StateRow(kRowZero - source);
      frames_[used_].raw |= raw << row;
      const bool joins = stretch.rows > 0 && raw == stretch.raw &&
                         row == stretch.row + stretch.rows &&
                         at == stretch.at + stretch.rows * RowStride(raw);
      if (!joins) {
        FetchStretch(used_, stretch);
        stretch = {raw, at, row, 0};
      }
      ++stretch.rows;
    }
    FetchStretch(used_, stretch);
  }

  // The kv half and the gate half of each row. With rows that are dense one transfer does, for
  // then the halves of all of them are evenly spaced.
  __aicore__ inline void FetchStretch(int f, const Stretch& stretch) {
    if (stretch.rows == 0) return;
    const GlobalTensor<float> source =
        stretch.raw ? kv_score_gm_[stretch.at] : state_gm_[stretch.at];
    const int64_t stride = RowStride(stretch.raw);
    const int half = frames_[f].half, together = stride == G::kRowWidth ? stretch.rows : 1;
    const LocalTensor<float> target =
        rows_[f * kFrameFloats<G> + stretch.row * G::kRowWidth + half];
    for (int i = 0; i < stretch.rows; i += together)
      CopyRows(target[i * G::kRowWidth], source[i * stride + half], 2 * together, kHalfBytes,
               kHalfBytes, Blocks(kHalfBytes));
  }

  __aicore__ inline int64_t RowStride(bool raw) const {
    return raw ? args_.kv_score_stride : args_.state_row_stride;
  }

  // Where the state has row `slot`, in elements.
  __aicore__ inline int64_t StateRow(int64_t slot) const {
    return paging_.Page(slot) * args_.state_page_stride +
           paging_.InPage(slot) * args_.state_row_stride;
  }

  // Loads the whole rows. Where neighbours in the call are neighbours in the tile, they come
  // together.
  __aicore__ inline void LoadRows() {
    int64_t token = 0;
    int row = 0, rows = 0;
    for (int f = 0; f < used_; ++f) {
      const Frame& frame = frames_[f];
      const int frame_row = f * kRatio + frame.row;
      if (frame.rows == 0) continue;
      if (rows > 0 && frame.token == token + rows && frame_row == row + rows) {
        rows += frame.rows;
        continue;
      }
      if (rows > 0) LoadStretch(token, row, rows);
      token = frame.token, row = frame_row, rows = frame.rows;
    }
    if (rows > 0) LoadStretch(token, row, rows);
  }

  __aicore__ inline void LoadStretch(int64_t token, int row, int rows) {
    CopyRows(rows_[row * G::kRowWidth], kv_score_gm_[token * args_.kv_score_stride], rows,
             G::kRowWidth * sizeof(float), Gap(args_.kv_score_stride), 0);
  }

  __aicore__ inline void SaveStretch(int64_t slot, int row, int rows) {
    const DataCopyExtParams params(static_cast<uint16_t>(rows), G::kRowWidth * sizeof(float), 0,
                                   Gap(args_.state_row_stride), 0);
    DataCopyPad(state_gm_[StateRow(slot)], rows_[row * G::kRowWidth], params);
  }

  // The bytes between two rows.
  __aicore__ inline uint32_t Gap(int64_t stride) const {
    return static_cast<uint32_t>((stride - G::kRowWidth) * sizeof(float));
  }

  __aicore__ inline void CopyRows(const LocalTensor<float>& target,
                                  const GlobalTensor<float>& source, int count, uint32_t bytes,
                                  uint32_t source_gap, uint32_t target_gap) {
    const DataCopyExtParams params(static_cast<uint16_t>(count), bytes, source_gap, target_gap, 0);
    DataCopyPad(target, source, params, DataCopyPadExtParams<float>());
  }

  RunArguments args_;
  Planned* plan_;
  Frame frames_[Budget<G>::kFrames];
  int used_ = 0;
  int64_t starts_[Budget<G>::kFrames];  // of the groups that windows end with, the first position
  int windows_ = 0;
  Paging paging_;
  GlobalTensor<float> kv_score_gm_, state_gm_, cos_sin_gm_;
  TQueBind<TPosition::VECIN, TPosition::VECOUT, 1> queue_;
  TBuf<TPosition::VECIN> bias_buffer_;
  LocalTensor<float> rows_, bias_;
};

}  // namespace dsv4
