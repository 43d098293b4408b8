// Memory in pages. A slot is the number of a row, or of an entry, in all pages together. A page has
// a power of two of them, for the scalar unit has no quick division.
#pragma once

#include "device.h"

namespace dsv4 {

class Paging {
 public:
  __aicore__ inline void Init(int64_t page) {
    page_ = page;
    while (int64_t{1} << shift_ < page) ++shift_;
  }

  __aicore__ inline int64_t Page(int64_t slot) const { return slot >> shift_; }
  __aicore__ inline int64_t InPage(int64_t slot) const { return slot & (page_ - 1); }

 private:
  int64_t page_;
  int shift_ = 0;
};

}  // namespace dsv4
