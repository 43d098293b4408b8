// From pooled windows to stored entries, some at a time.
#pragma once

#include "formats.h"

namespace {

// Pooled windows on their way to the cache. They are finished some at a time and step by step:
// within an entry each step waits for a sum over all of it, which other entries fill.
template <class G>
class Entries {
 public:
  Entries(const LayerCall& call, const Entry<G::kHeadDim>& norm_weight)
      : call_(call), a_(call.layer), norm_weight_(norm_weight) {}

  // `token` closes the window.
  void add(int64_t token, const Entry<G::kHeadDim>& pooled) {
    token_[count_] = token;
    entry_[count_++] = pooled;
    if (count_ == kMost) finish();
  }

  // To be called after the last one.
  void finish() {
    float scale[kMost] = {};
    for (int i = 0; i < count_; ++i) scale[i] = inverse_rms(entry_[i], static_cast<float>(a_.eps));
    for (int i = 0; i < count_; ++i) {
      normalise(entry_[i], scale[i], norm_weight_);
      const int64_t position = call_.positions[token_[i]] - G::kRatio + 1;
      rotate(entry_[i], a_.cos_sin + position * a_.cos_sin_stride);
    }
    if constexpr (G::kHeadDim == Main4::kHeadDim)
      a_.k_format == kFp8DsMla ? store_ds_mla() : store_bf16();
    else
      a_.k_format == kFp8Pow2 ? store_fp8() : store_int8();
    count_ = 0;
  }

 private:
  static constexpr int kMost = 4;

  void store_fp8() {
    int32_t largest[kMost];
    for (int i = 0; i < count_; ++i) largest[i] = largest_magnitude(entry_[i]);
    for (int i = 0; i < count_; ++i)
      ::store_fp8(a_, call_.k_slots[token_[i]], entry_[i], largest[i]);
  }

  void store_int8() {
    for (int i = 0; i < count_; ++i) ::store_int8(a_, call_.k_slots[token_[i]], entry_[i]);
  }

  void store_ds_mla() {
    for (int i = 0; i < count_; ++i) ::store_ds_mla(a_, call_.k_slots[token_[i]], entry_[i]);
  }

  void store_bf16() {
    for (int i = 0; i < count_; ++i)
      store_bfloat16(bf16_place(a_, call_.k_slots[token_[i]]), entry_[i]);
  }

  const LayerCall& call_;
  const LayerArguments& a_;
  const Entry<G::kHeadDim>& norm_weight_;
  Entry<G::kHeadDim> entry_[kMost];
  int64_t token_[kMost];
  int count_ = 0;
};

}  // namespace
