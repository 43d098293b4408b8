// Where the caches have what: the state its rows, the K cache its entries in the layout of a
// format.
#pragma once

#include "call.h"

namespace dsv4 {

static inline float* state_row(const LayerCall& call, int64_t slot) {
  const LayerArguments& l = call.layer;
  return l.state + slot / l.state_page * l.state_page_stride +
         slot % l.state_page * l.state_row_stride;
}

// An fp8 page: the codes of all its entries, then their scales.
struct Fp8Place {
  uint8_t* codes;
  uint8_t* scale;
};

static inline Fp8Place fp8_place(const LayerArguments& l, int64_t slot) {
  uint8_t* page = static_cast<uint8_t*>(l.k_cache) + slot / kFp8PageEntries * l.k_page_stride;
  const int64_t entry = slot % kFp8PageEntries;
  return {page + entry * kHeadDim, page + kFp8ScaleOffset + entry * sizeof(float)};
}

// Where another format's cache, whose pages may have any size, has the entry of a slot.
struct KSlot {
  int64_t page, entry;
};

static inline KSlot k_slot(const LayerArguments& l, int64_t slot) {
  return {slot / l.k_page, slot % l.k_page};
}

// An fp8_ds_mla page: the codes and rotated channels of all its entries, then their exponents.
struct DsMlaPlace {
  uint8_t *codes, *rotated, *exponents;
};

static inline DsMlaPlace ds_mla_place(const LayerArguments& l, int64_t slot) {
  const KSlot at = k_slot(l, slot);
  uint8_t* page = static_cast<uint8_t*>(l.k_cache) + at.page * l.k_page_stride;
  uint8_t* codes = page + at.entry * kDsMlaDataBytes;
  return {codes, codes + kDsMlaCodes,
          page + l.k_page * kDsMlaDataBytes + at.entry * kDsMlaScaleBytes};
}

// int8 and bf16: an entry in a tensor of them, in elements.
static inline int64_t k_entry(const LayerArguments& l, KSlot at) {
  return at.page * l.k_page_stride + at.entry * l.k_entry_stride;
}

// int8: the codes in one tensor, the scales in another.
struct Int8Place {
  int8_t* codes;
  int64_t scale;  // in elements of k_scale
};

static inline Int8Place int8_place(const LayerArguments& l, int64_t slot) {
  const KSlot at = k_slot(l, slot);
  return {static_cast<int8_t*>(l.k_cache) + k_entry(l, at),
          at.page * l.k_scale_page_stride + at.entry * l.k_scale_entry_stride};
}

static inline uint16_t* bf16_place(const LayerArguments& l, int64_t slot) {
  return static_cast<uint16_t*>(l.k_cache) + k_entry(l, k_slot(l, slot));
}

}  // namespace dsv4
