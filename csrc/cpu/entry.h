// The arithmetic of one K entry up to its format: pool a window's rows, RMSNorm, RoPE.
// ops/reference.py is the same in torch.
#pragma once

#include "pages.h"
#include "vec.h"

namespace {

using namespace dsv4;

// Channels of an entry, the even ones apart from the odd ones: RoPE rotates such pairs.
template <int channels>
struct Entry {
  static constexpr int kVectors = channels / 2 / kLanes;
  Floats even[kVectors], odd[kVectors];
};

template <int channels, class T>
Entry<channels> paired(const T* values) {
  Entry<channels> x;
  for (int i = 0; i < x.kVectors; ++i) {
    const T* p = values + 2 * i * kLanes;
    x.even[i] = pairs(load(p), load(p + kLanes)).even;
    x.odd[i] = pairs(load(p), load(p + kLanes)).odd;
  }
  return x;
}

template <int channels>
Entry<channels> norm_weight(const LayerArguments& a) {
  return a.norm_weight_is_bf16 ? paired<channels>(static_cast<const bfloat16*>(a.norm_weight))
                               : paired<channels>(static_cast<const float*>(a.norm_weight));
}

template <class T>
const T* kv_score_row(const LayerCall& call, int64_t token) {
  return static_cast<const T*>(call.kv_score) + token * call.kv_score_stride;
}

// Where overlapping windows meet, the rows of the last group lend their front halves, those of the
// window's own group their back halves.
template <class G>
int half_of_row(int j) {
  return j < G::kRatio ? 0 : G::kHeadDim;
}

// A row that the request does not have: no kv, and a gate that the softmax ignores.
template <class G>
struct MaskedRow {
  float values[G::kKvWidth + G::kHeadDim] = {};
  constexpr MaskedRow() {
    for (int c = 0; c < G::kHeadDim; ++c) values[G::kKvWidth + c] = -__builtin_inff();
  }
};
template <class G>
constexpr MaskedRow<G> kMaskedRow;

// Rows of a window: of each the kv half that the window pools; the gate half lies kKvWidth further
// on.
constexpr int kTogether = 8;
struct Rows {
  const float* row[kTogether];
};

// A softmax over rows, each channel for itself, to be divided at the end.
struct Softmax {
  Floats most, numerator, denominator;
};
constexpr float kLowest = -__FLT_MAX__;  // below any gate but -inf, which so gets no weight

// Takes eight rows, `more` than are in `sums`. Two sums each, for shorter chains.
template <class G, bool more>
void pool(const Rows& rows, int c, Softmax& sums) {
  Floats score[kTogether + more];
  DSV4_UNROLL
  for (int j = 0; j < kTogether; ++j) score[j] = load(rows.row[j] + G::kKvWidth + c);
  Floats most = larger(larger(larger(score[0], score[1]), larger(score[2], score[3])),
                       larger(larger(score[4], score[5]), larger(score[6], score[7])));
  if constexpr (more) {
    most = larger(most, sums.most);
    score[kTogether] = sums.most;
  }
  DSV4_UNROLL
  for (int j = 0; j < kTogether + more; ++j) score[j] -= most;
  exp_nonpositive(score);
  Floats numerator[2] = {}, denominator[2] = {};
  if constexpr (more) {
    numerator[0] = sums.numerator * score[kTogether];
    denominator[0] = sums.denominator * score[kTogether];
  }
  DSV4_UNROLL
  for (int j = 0; j < kTogether; ++j) {
    numerator[j % 2] = multiply_add(score[j], load(rows.row[j] + c), numerator[j % 2]);
    denominator[j % 2] += score[j];
  }
  sums = {most, numerator[0] + numerator[1], denominator[0] + denominator[1]};
}

// Pools a window, eight rows at a time.
template <class G>
class Window {
 public:
  Window() {
    if constexpr (kMore)
      for (Softmax& sums : sums_) sums = {broadcast(kLowest), Floats{}, Floats{}};
  }

  void add(const Rows& rows) {
    for (int i = 0; i < kVectors; ++i) pool<G, kMore>(rows, i * kLanes, sums_[i]);
  }

  // To be called after the last row.
  Entry<G::kHeadDim> entry() const {
    alignas(64) float pooled[G::kHeadDim];
    for (int i = 0; i < kVectors; ++i)
      store(pooled + i * kLanes, sums_[i].numerator / sums_[i].denominator);
    return paired<G::kHeadDim>(pooled);
  }

 private:
  static constexpr bool kMore = G::kWindow > kTogether;
  static constexpr int kVectors = G::kHeadDim / kLanes;
  Softmax sums_[kVectors];
};

// What RMSNorm multiplies x by. The sum of squares is taken in sixteen lanes whatever the vector
// length.
template <int channels>
float inverse_rms(const Entry<channels>& x, float eps) {
  constexpr int kSums = 16 / kLanes;
  Floats sums[kSums] = {};
  DSV4_UNROLL
  for (int i = 0; i < x.kVectors; ++i) {
    Floats& sum = sums[i % kSums];
    sum = multiply_add(x.odd[i], x.odd[i], multiply_add(x.even[i], x.even[i], sum));
  }
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  const float sum = fold(sums[0], [](Floats a, Floats b) { return a + b; });
  return 1.0f / __builtin_sqrtf(sum / channels + eps);
}

template <int channels>
void normalise(Entry<channels>& x, float scale, const Entry<channels>& weight) {
  DSV4_UNROLL
  for (int i = 0; i < x.kVectors; ++i) {
    x.even[i] = x.even[i] * scale * weight.even[i];
    x.odd[i] = x.odd[i] * scale * weight.odd[i];
  }
}

// Rotates the last kRopeDim channels; `cos_sin` is the table's row: 32 cosines, then 32 sines.
template <int channels>
void rotate(Entry<channels>& x, const float* cos_sin) {
  constexpr int kRotated = kRopeDim / 2 / kLanes;
  DSV4_UNROLL
  for (int i = 0; i < kRotated; ++i) {
    Floats& even = x.even[x.kVectors - kRotated + i];
    Floats& odd = x.odd[x.kVectors - kRotated + i];
    const Floats a = even, b = odd;
    const Floats cos = load(cos_sin + i * kLanes), sin = load(cos_sin + kRopeDim / 2 + i * kLanes);
    even = a * cos - b * sin;
    odd = b * cos + a * sin;
  }
}

}  // namespace
