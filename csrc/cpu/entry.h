// The arithmetic of one K entry up to its format: pool eight rows, RMSNorm, RoPE. ops/reference.py
// is the same in torch.
#pragma once

#include "pages.h"
#include "vec.h"

namespace {

using namespace dsv4;

// The channels of one entry, the even ones apart from the odd ones: RoPE rotates such pairs.
constexpr int kPairVectors = kHeadDim / 2 / kLanes;
struct Entry {
  Floats even[kPairVectors], odd[kPairVectors];
};

template <class T>
Entry paired(const T* values) {
  Entry x;
  for (int i = 0; i < kPairVectors; ++i) {
    const T* p = values + 2 * i * kLanes;
    x.even[i] = pairs(load(p), load(p + kLanes)).even;
    x.odd[i] = pairs(load(p), load(p + kLanes)).odd;
  }
  return x;
}

Entry norm_weight(const LayerArguments& a) {
  return a.norm_weight_is_bf16 ? paired(static_cast<const bfloat16*>(a.norm_weight))
                               : paired(static_cast<const float*>(a.norm_weight));
}

// The rows of a window: of each the kv half that this window pools; the gate half lies kKvWidth
// further on.
struct Window {
  const float* row[kWindow];
};

template <class T>
const T* kv_score_row(const LayerCall& call, int64_t token) {
  return static_cast<const T*>(call.kv_score) + token * call.kv_score_stride;
}

// The first four rows of a window lend it their front halves, the last four, its own group, their
// back halves.
int half_of_row(int j) { return j < kRatio ? 0 : kHeadDim; }

// A row that the request does not have: no kv, and a gate that the softmax ignores.
struct MaskedRow {
  float values[kKvWidth + kHeadDim] = {};
  constexpr MaskedRow() {
    for (int c = 0; c < kHeadDim; ++c) values[kKvWidth + c] = -__builtin_inff();
  }
};
constexpr MaskedRow kMaskedRow;

// softmax over the eight rows, per channel; divided at the end. Two sums each, for shorter chains.
Floats pool(const Window& window, int c) {
  Floats score[kWindow];
  DSV4_UNROLL
  for (int j = 0; j < kWindow; ++j) score[j] = load(window.row[j] + kKvWidth + c);
  const Floats most = larger(larger(larger(score[0], score[1]), larger(score[2], score[3])),
                             larger(larger(score[4], score[5]), larger(score[6], score[7])));
  DSV4_UNROLL
  for (int j = 0; j < kWindow; ++j) score[j] -= most;
  exp_nonpositive(score);
  Floats numerator[2] = {}, denominator[2] = {};
  DSV4_UNROLL
  for (int j = 0; j < kWindow; ++j) {
    numerator[j % 2] = multiply_add(score[j], load(window.row[j] + c), numerator[j % 2]);
    denominator[j % 2] += score[j];
  }
  return (numerator[0] + numerator[1]) / (denominator[0] + denominator[1]);
}

Entry pool(const Window& window) {
  alignas(64) float pooled[kHeadDim];
  for (int c = 0; c < kHeadDim; c += kLanes) store(pooled + c, pool(window, c));
  return paired(pooled);
}

// What RMSNorm multiplies x by. The sum of squares is taken in sixteen lanes whatever the vector
// length.
float inverse_rms(const Entry& x, float eps) {
  constexpr int kSums = 16 / kLanes;
  Floats sums[kSums] = {};
  DSV4_UNROLL
  for (int i = 0; i < kPairVectors; ++i) {
    Floats& sum = sums[i % kSums];
    sum = multiply_add(x.odd[i], x.odd[i], multiply_add(x.even[i], x.even[i], sum));
  }
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  const float sum = fold(sums[0], [](Floats a, Floats b) { return a + b; });
  return 1.0f / __builtin_sqrtf(sum / kHeadDim + eps);
}

void normalise(Entry& x, float scale, const Entry& weight) {
  DSV4_UNROLL
  for (int i = 0; i < kPairVectors; ++i) {
    x.even[i] = x.even[i] * scale * weight.even[i];
    x.odd[i] = x.odd[i] * scale * weight.odd[i];
  }
}

// Rotates the last kRopeDim channels; `cos_sin` is the table's row: 32 cosines, then 32 sines.
void rotate(Entry& x, const float* cos_sin) {
  constexpr int kRotated = kRopeDim / 2 / kLanes;
  DSV4_UNROLL
  for (int i = 0; i < kRotated; ++i) {
    Floats& even = x.even[kPairVectors - kRotated + i];
    Floats& odd = x.odd[kPairVectors - kRotated + i];
    const Floats a = even, b = odd;
    const Floats cos = load(cos_sin + i * kLanes), sin = load(cos_sin + kRopeDim / 2 + i * kLanes);
    even = a * cos - b * sin;
    odd = b * cos + a * sin;
  }
}

}  // namespace
