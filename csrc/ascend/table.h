// A block table in global memory: which page holds which rows (or entries) of a request.
#pragma once

#include "device.h"
#include "paging.h"

namespace dsv4 {

class Table {
 public:
  __aicore__ inline void Init(uint64_t address, int64_t stride, int64_t requests, int64_t columns,
                              int64_t page, int64_t pages) {
    gm_.SetGlobalBuffer((__gm__ int32_t*)address);
    stride_ = stride, requests_ = requests, columns_ = columns, page_ = page, pages_ = pages;
    paging_.Init(page);
  }

  // The slot of row `index` of a request, or -1: it has none, or page 0, which is nobody's.
  __aicore__ inline int64_t Slot(int64_t request, int64_t index) {
    const int64_t column = paging_.Page(index);
    if (request < 0 || request >= requests_ || column >= columns_) return -1;
    if (request != request_ || column != column_) {  // else it is the page of the look-up before
      request_ = request, column_ = column;
      found_ = ReadFresh(gm_[request * stride_ + column]);
    }
    return found_ > 0 && found_ < pages_ ? found_ * page_ + paging_.InPage(index) : -1;
  }

 private:
  GlobalTensor<int32_t> gm_;
  Paging paging_;
  int64_t stride_, requests_, columns_, page_, pages_;
  int64_t request_ = -1, column_ = -1, found_ = 0;  // the last look-up
};

}  // namespace dsv4
