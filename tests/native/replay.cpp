// Replays calls that record.py has recorded, from stdin, and compares what they store.
#include "calls.h"

namespace {

template <class T>
bool receive(T& value) {
  return std::fread(&value, sizeof value, 1, stdin) == 1;
}

std::vector<calls::Bytes> receive_arrays(const std::vector<int64_t>& sizes) {
  std::vector<calls::Bytes> arrays;
  for (const int64_t size : sizes) {
    calls::Bytes bytes(size);
    calls::require(std::fread(bytes.data(), 1, size, stdin) == bytes.size(),
                   "a record is cut short");
    arrays.push_back(std::move(bytes));
  }
  return arrays;
}

}  // namespace

int main() {
  int replayed = 0;
  for (char algorithm[32]; receive(algorithm); ++replayed) {
    calls::Call call;
    calls::Outcome expected{};
    int64_t count = 0;
    receive(call.head_dim), receive(call.ratio);
    receive(call.step), receive(call.layer), receive(call.kv_score);
    receive(expected.planned), receive(expected.stored), receive(count);
    std::vector<int64_t> sizes(count);
    for (int64_t& size : sizes) receive(size);
    call.arrays = receive_arrays(sizes);
    expected.arrays = receive_arrays(sizes);
    calls::require(calls::run_everywhere(call, algorithm,
                                         {calls::by_grain, calls::on_four_threads}) == expected,
                   "call %d, %s: another outcome than recorded", replayed, algorithm);
  }
  std::printf("%d calls\n", replayed);
}
