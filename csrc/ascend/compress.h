// The kernel of one vector core: saves the state rows of its tokens and stores the entries that
// they close.
//
// A core owns the groups of four positions that begin among its tokens, and works through them in
// tiles of four frames (a frame holds the four rows of one group). The rows of a tile come in by
// MTE2, get the gate's bias, go out again as state rows by MTE3, and are pooled in between: no
// intermediate value leaves the unified buffer. A window's first four rows are the frame before its
// own; where that is not in the unified buffer (a request's first window, the first of a core's
// span), a frame is filled with their front halves: rows of this call raw from kv_score, older ones
// from the state, as the step's plan says. No core reads a row that this launch writes; README.md
// has the argument.
#pragma once

#include "../layout.h"
#include "abi.h"
#include "device.h"
#include "finish.h"
#include "planned.h"
#include "pool.h"
#include "tiling.h"

namespace dsv4 {

// kOnePass is the product. The others are the two steps of the algorithms that it is compared with,
// for which the plan has all windows early and all rows in the state: kSave saves the rows;
// kPoolState pools every window from the state (after kSave); kPoolScan pools it from the state,
// overlaid with the rows of this call that a scan over all its tokens finds (before kSave).
enum Algorithm { kOnePass, kSave, kPoolState, kPoolScan };

template <Algorithm kAlgorithm, int64_t kFormat>
class Compress {
 public:
  __aicore__ inline void Init(TPipe* pipe, const RunArguments& a, const Tiling& tiling) {
    args_ = a;
    begin_ = AscendC::GetBlockIdx() * tiling.tokens_per_core;
    end_ = begin_ + tiling.tokens_per_core < a.tokens ? begin_ + tiling.tokens_per_core : a.tokens;
    kv_score_gm_.SetGlobalBuffer((__gm__ float*)a.kv_score);
    state_gm_.SetGlobalBuffer((__gm__ float*)a.state);
    cos_sin_gm_.SetGlobalBuffer((__gm__ float*)a.cos_sin);
    plan_gm_.SetGlobalBuffer((__gm__ int64_t*)a.plan);
    plan_.Init(pipe, a);
    pipe->InitBuffer(tile_queue_, 2, (kFrames * kFrameFloats + kFrames * kRopeDim) * sizeof(float));
    pipe->InitBuffer(bias_buffer_, kRatio * kKvWidth * sizeof(float));
    bias_ = bias_buffer_.template Get<float>();
    LoadBias(pipe);
    if constexpr (kAlgorithm != kSave) {
      pipe->InitBuffer(carry_buffer_, kFrameFloats * sizeof(float));
      carry_ = carry_buffer_.template Get<float>();
      pool_.Init(pipe);
      finish_.Init(pipe, a);
    }
  }

  __aicore__ inline void Process() {
    // A plan of another step or for other caches: better nothing than anything.
    if (!plan_.Fits(args_, kAlgorithm == kOnePass ? kPlanLayout : kStateOnlyLayout)) return;
    plan_.Hold(begin_, end_ + Planned::kAhead);
    // The rest of a group of the core before is not this one's.
    while (begin_ < end_ && !plan_.BeginsGroup(begin_)) ++begin_;
    for (next_ = begin_; next_ < end_;) {
      tile_ = tile_queue_.template AllocTensor<float>();
      CopyIn();
      tile_queue_.template EnQue<TPosition::GM, TPosition::VECIN, float>(tile_);
      tile_ = tile_queue_.template DeQue<TPosition::GM, TPosition::VECIN, float>();
      Compute();
      tile_queue_.template EnQue<TPosition::VECOUT, TPosition::GM, float>(tile_);
      tile_ = tile_queue_.template DeQue<TPosition::VECOUT, TPosition::GM, float>();
      if constexpr (kAlgorithm == kOnePass || kAlgorithm == kSave) CopyOut();
      tile_queue_.FreeTensor(tile_);
    }
    if constexpr (kAlgorithm != kSave) finish_.Flush();
  }

 private:
  static constexpr int kFrames = 4;
  static constexpr int kHalfBytes = kHeadDim * sizeof(float);
  static constexpr float kWeightless = -3e38f;  // a gate whose weight is 0 beside any other

  // One group of four positions, or the front halves of the one before a window.
  struct Frame {
    int64_t token;  // of the first row that is a token's
    int row, rows;  // rows [row, row + rows) are tokens of this core
    int half;       // where the 128 channels of the other rows begin
    int raw;        // bits: rows that came from kv_score and lack the bias
    int absent;     // bits: rows that do not exist
    int64_t entry;  // the entry of the window that ends here, or -1
  };

  // Rows of a frame that lie together in kv_score, raw, or in the state: `at` is where, in
  // elements.
  struct Stretch {
    bool raw;
    int64_t at;
    int row, rows;
  };

  __aicore__ inline void LoadBias(TPipe* pipe) {
    GlobalTensor<float> gm;
    gm.SetGlobalBuffer((__gm__ float*)args_.ape, kRatio * kKvWidth);
    DataCopyPad(bias_, gm, DataCopyExtParams(1, kRatio * kKvWidth * sizeof(float), 0, 0, 0),
                DataCopyPadExtParams<float>());
    Order<HardEvent::MTE2_V>(pipe);
  }

  // Takes groups from next_ on until the tile is full or the span ends, and starts the transfers of
  // their rows.
  __aicore__ inline void CopyIn() {
    used_ = 0;
    plan_.Hold(next_, end_ + Planned::kAhead);
    while (next_ < end_ && used_ < kFrames) {
      const int64_t first = next_, last = LastOfGroup(first);
      const int64_t entry = kAlgorithm == kSave ? -1 : plan_.KSlot(last);
      // A late window's first four rows are the group before it, which this core has, unless it has
      // just begun.
      const bool fetches = entry >= 0 && !(full_ && plan_.IsLate(last));
      if (used_ + 1 + fetches > kFrames) break;
      if (fetches) FetchPrevious(last);
      TakeGroup(first, last, entry);
      next_ = last + 1;
    }
    LoadRows();
  }

  __aicore__ inline int64_t LastOfGroup(int64_t first) {
    int64_t last = first;
    while (last + 1 < args_.tokens && !plan_.BeginsGroup(last + 1)) ++last;
    return last;
  }

  __aicore__ inline void FetchPrevious(int64_t last) {
    frames_[used_] = {last, 0, 0, 0, 0, 0, -1};
    Fetch(used_, last, 0, kRatio);
    ++used_;
  }

  __aicore__ inline void TakeGroup(int64_t first, int64_t last, int64_t entry) {
    Frame& frame = frames_[used_];
    const int64_t position = plan_.Position(first);
    const int row = static_cast<int>(position & (kRatio - 1)),
              rows = static_cast<int>(last - first + 1);
    frame = {first, row, rows, kHeadDim, 0, 0, entry};
    if constexpr (kAlgorithm == kPoolState || kAlgorithm == kPoolScan) {
      frame.rows = 0;
      if (entry >= 0) Fetch(used_, last, kRatio, kRatio);
      if (entry >= 0 && kAlgorithm == kPoolScan) Overlay(last);
    } else {
      frame.raw = ((1 << rows) - 1) << row;
      if (entry >= 0) Fetch(used_, last, kRatio, row);
    }
    if (entry >= 0) {
      const GlobalTensor<float> source = cos_sin_gm_[(position - row) * args_.cos_sin_stride];
      CopyRows(tile_[kFrames * kFrameFloats + used_ * kRopeDim], source, 1,
               kRopeDim * sizeof(float), 0, 0);
    }
    full_ = rows == kRatio;
    ++used_;
  }

  // Fills rows [0, rows) of frame f, which are rows `first` and on of the window of `last`, with
  // the halves that it uses. What lies together in memory comes together.
  __aicore__ inline void Fetch(int f, int64_t last, int first, int rows) {
    Stretch stretch = {false, 0, 0, 0};
    for (int row = 0; row < rows; ++row) {
      const int64_t source = plan_.Source(last, first + row);
      if (source == kMasked) {
        frames_[f].absent |= 1 << row;
        continue;
      }
      const bool raw = source >= 0;
      const int64_t at = raw ? source * args_.kv_score_stride : StateRow(kRowZero - source);
      frames_[f].raw |= raw << row;
      const bool joins = stretch.rows > 0 && raw == stretch.raw &&
                         row == stretch.row + stretch.rows &&
                         at == stretch.at + stretch.rows * RowStride(raw);
      if (!joins) {
        FetchStretch(f, stretch);
        stretch = {raw, at, row, 0};
      }
      ++stretch.rows;
    }
    FetchStretch(f, stretch);
  }

  __aicore__ inline void FetchStretch(int f, const Stretch& stretch) {
    if (stretch.rows == 0) return;
    const GlobalTensor<float> source =
        stretch.raw ? kv_score_gm_[stretch.at] : state_gm_[stretch.at];
    FetchHalves(f, stretch.row, source, stretch.rows, RowStride(stretch.raw));
  }

  __aicore__ inline int64_t RowStride(bool raw) const {
    return raw ? args_.kv_score_stride : args_.state_row_stride;
  }

  // Where the state has row `slot`, in elements.
  __aicore__ inline int64_t StateRow(int64_t slot) const {
    return slot / args_.state_page * args_.state_page_stride +
           slot % args_.state_page * args_.state_row_stride;
  }

  // The kv half and the gate half of `rows` rows: with rows of 512 floats one transfer, for then
  // the halves of all of them are evenly spaced.
  __aicore__ inline void FetchHalves(int f, int row, const GlobalTensor<float>& source, int rows,
                                     int64_t stride) {
    const int half = frames_[f].half, together = stride == kRowWidth ? rows : 1;
    const LocalTensor<float> target = tile_[f * kFrameFloats + row * kRowWidth + half];
    for (int i = 0; i < rows; i += together)
      CopyRows(target[i * kRowWidth], source[i * stride + half], 2 * together, kHalfBytes,
               kHalfBytes, kHalfBytes / (kBlockFloats * sizeof(float)));
  }

  // kPoolScan: every token of the call is looked at, for every window, whose frames are used_ - 1
  // and used_.
  __aicore__ inline void Overlay(int64_t last) {
    const int64_t start = plan_.Position(last) - kWindow + 1, request = plan_.Request(last);
    const GlobalTensor<int64_t> positions = plan_gm_[kPlanHeader + kPositions * args_.tokens];
    const GlobalTensor<int64_t> requests = plan_gm_[kPlanHeader + kRequests * args_.tokens];
    for (int64_t token = 0; token < args_.tokens; ++token) {
      const int64_t row = positions.GetValue(token) - start;
      const bool padding = row + start < 0;  // whose request may be any
      if (padding || row < 0 || row >= kWindow || requests.GetValue(token) != request) continue;
      const int f = used_ - 1 + static_cast<int>(row / kRatio),
                in_frame = static_cast<int>(row % kRatio);
      AscendC::PipeBarrier<PIPE_MTE2>();
      FetchStretch(f, {true, token * args_.kv_score_stride, in_frame, 1});
      frames_[f].raw |= 1 << in_frame;
      frames_[f].absent &= ~(1 << in_frame);
    }
  }

  // The whole rows of the tile's tokens. Where neighbours in the call are neighbours in the tile,
  // they come together.
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
      if (rows > 0) LoadRun(token, row, rows);
      token = frame.token, row = frame_row, rows = frame.rows;
    }
    if (rows > 0) LoadRun(token, row, rows);
  }

  __aicore__ inline void LoadRun(int64_t token, int row, int rows) {
    CopyRows(tile_[row * kRowWidth], kv_score_gm_[token * args_.kv_score_stride], rows,
             kRowWidth * sizeof(float),
             static_cast<uint32_t>((args_.kv_score_stride - kRowWidth) * sizeof(float)), 0);
  }

  __aicore__ inline void CopyRows(const LocalTensor<float>& target,
                                  const GlobalTensor<float>& source, int count, uint32_t bytes,
                                  uint32_t source_gap, uint32_t target_gap) {
    const DataCopyExtParams params(static_cast<uint16_t>(count), bytes, source_gap, target_gap, 0);
    DataCopyPad(target, source, params, DataCopyPadExtParams<float>());
  }

  // Adds the bias, makes absent rows weightless, and pools the windows.
  __aicore__ inline void Compute() {
    LocalTensor<float> previous = carry_;
    for (int f = 0; f < used_; ++f) {
      const Frame& frame = frames_[f];
      const LocalTensor<float> rows = tile_[f * kFrameFloats];
      for (int row = 0; row < kRatio; ++row) {
        const LocalTensor<float> kv = rows[row * kRowWidth], gate = kv[kKvWidth],
                                 bias = bias_[row * kKvWidth];
        const bool whole = row >= frame.row && row < frame.row + frame.rows;
        const int at = whole ? 0 : frame.half, width = whole ? kKvWidth : kHeadDim;
        if (frame.raw >> row & 1) Add(gate[at], gate[at], bias[at], width);
        if (frame.absent >> row & 1) {
          Duplicate(kv[at], 0.0f, width);
          Duplicate(gate[at], kWeightless, width);
        }
      }
      if constexpr (kAlgorithm != kSave) {
        if (frame.entry >= 0) {
          pool_.Run(finish_.Pooled(), previous, rows);
          Copy(finish_.CosSin(), tile_[kFrames * kFrameFloats + f * kRopeDim], kRopeDim, 1,
               {1, 1, 8, 8});
          finish_.Take(frame.entry);
        }
      }
      previous = rows;
    }
    if constexpr (kAlgorithm == kOnePass)
      if (full_ && next_ < end_) Carry(previous);
  }

  // Keeps the front halves of the last frame for the tile to come.
  __aicore__ inline void Carry(const LocalTensor<float>& rows) {
    for (int part = 0; part < kRowWidth; part += kKvWidth)
      for (int c = part; c < part + kHeadDim; c += kLanes)
        Copy(carry_[c], rows[c], kLanes, kRatio, {1, 1, kRowBlocks, kRowBlocks});
  }

  // Saves the rows of the tile's tokens. Where neighbours in the tile are neighbours in a page,
  // they go together.
  __aicore__ inline void CopyOut() {
    int64_t slot = 0;
    int row = 0, rows = 0;
    for (int f = 0; f < used_; ++f) {
      const Frame& frame = frames_[f];
      for (int i = 0; i < frame.rows; ++i) {
        const int64_t to = plan_.StateSlot(frame.token + i);
        const int from = f * kRatio + frame.row + i;
        if (rows > 0 && from == row + rows && to == slot + rows && to % args_.state_page != 0) {
          ++rows;
          continue;
        }
        if (rows > 0) SaveRun(slot, row, rows);
        slot = to, row = from, rows = to >= 0;
      }
    }
    if (rows > 0) SaveRun(slot, row, rows);
  }

  __aicore__ inline void SaveRun(int64_t slot, int row, int rows) {
    const uint32_t gap =
        static_cast<uint32_t>((args_.state_row_stride - kRowWidth) * sizeof(float));
    const DataCopyExtParams params(static_cast<uint16_t>(rows), kRowWidth * sizeof(float), 0, gap,
                                   0);
    DataCopyPad(state_gm_[StateRow(slot)], tile_[row * kRowWidth], params);
  }

  RunArguments args_;
  int64_t begin_, end_, next_;  // the core's tokens; the first that is in no tile yet
  Frame frames_[kFrames];
  int used_ = 0;
  bool full_ = false;  // the last frame holds four tokens of this core
  Planned plan_;
  Pool pool_;
  Finish<kFormat> finish_;
  GlobalTensor<float> kv_score_gm_, state_gm_, cos_sin_gm_;
  GlobalTensor<int64_t> plan_gm_;
  TQueBind<TPosition::VECIN, TPosition::VECOUT, 1> tile_queue_;
  TBuf<TPosition::VECIN> bias_buffer_;
  TBuf<> carry_buffer_;
  LocalTensor<float> tile_, bias_, carry_;
};

template <Algorithm kAlgorithm, int64_t kFormat>
__aicore__ inline void run(const RunArguments& arguments, const Tiling& tiling) {
  TPipe pipe;
  Compress<kAlgorithm, kFormat> compress;
  compress.Init(&pipe, arguments, tiling);
  compress.Process();
}

}  // namespace dsv4
