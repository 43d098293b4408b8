// A fuzz target for the C interface: a step, a layer and their values from the fuzzer's bytes. What
// the checks let through is run by every algorithm, with every instruction set, on watched memory.
//
// The layer's own fields are sound, since Python checks them; the step's values are anything.
#include "calls.h"

namespace {

using calls::Bytes;

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}

  uint8_t byte() { return data_ < end_ ? *data_++ : 0; }
  int64_t below(int64_t end) { return byte() % end; }
  bool flag() { return byte() & 1; }

 private:
  const uint8_t *data_, *const end_;
};

// Numbers without end, from a seed.
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed * 2 + 1) {}
  uint32_t next() { return (state_ = state_ * 6364136223846793005u + 1442695040888963407u) >> 32; }

 private:
  uint64_t state_;
};

enum Kind { kMild, kAnyBits };

// Floats of that kind, as fp32 or bf16.
Bytes floats(size_t count, bool is_bf16, Kind kind, uint64_t seed) {
  Numbers numbers(seed);
  Bytes bytes(count * (is_bf16 ? 2 : 4));
  for (size_t i = 0; i < count; ++i) {
    const uint32_t bits = numbers.next();
    const float mild = static_cast<float>(static_cast<int32_t>(bits)) * 0x1p-30f;
    uint32_t value = bits;
    if (kind == kMild) std::memcpy(&value, &mild, sizeof value);
    if (is_bf16)
      std::memcpy(&bytes[2 * i], reinterpret_cast<uint8_t*>(&value) + 2, 2);
    else
      std::memcpy(&bytes[4 * i], &value, 4);
  }
  return bytes;
}

class Builder {
 public:
  explicit Builder(Input input) : in_(input) {}

  calls::Call build() {
    dsv4::StepArguments& s = call_.step;
    dsv4::LayerArguments& l = call_.layer;
    seed_ = in_.byte();
    kind_ = in_.flag() ? kAnyBits : kMild;
    wild_ = in_.below(4) == 3;
    s.tokens = 1 + in_.below(64);
    s.requests = 1 + in_.below(4);
    s.state_page = 2 << in_.below(3);
    s.state_pages = 2 + in_.below(11);
    s.table_columns = in_.below(34);
    s.block_table_stride = s.table_columns + in_.below(2);
    s.max_pos = 1 + in_.below(64);
    state();
    k_cache();
    s.k_entries = l.k_pages * l.k_page;
    weights();
    tokens();
    // A plan for larger caches than the layer's must be refused.
    if (in_.below(16) == 15) (in_.flag() ? s.state_pages : s.max_pos) += 1;
    return std::move(call_);
  }

 private:
  void* add(Bytes bytes) {
    call_.arrays.push_back(std::move(bytes));
    return calls::place(call_.arrays.size() - 1);
  }

  template <class T>
  const T* add_values(const std::vector<T>& values) {
    const auto* data = reinterpret_cast<const uint8_t*>(values.data());
    return static_cast<const T*>(add(Bytes(data, data + values.size() * sizeof(T))));
  }

  Bytes words(size_t bytes) {
    Bytes words = floats((bytes + 3) / 4, false, kind_, ++seed_);
    words.resize(bytes);
    return words;
  }

  void state() {
    const dsv4::StepArguments& s = call_.step;
    dsv4::LayerArguments& l = call_.layer;
    l.state_pages = s.state_pages, l.state_page = s.state_page;
    l.state_row_stride = dsv4::kRowWidth + 16 * in_.below(2) + in_.below(8) / 7;
    l.state_page_stride = l.state_page * l.state_row_stride + 16 * in_.below(2) + in_.below(8) / 7;
    const int64_t last = (l.state_pages - 1) * l.state_page_stride +
                         (l.state_page - 1) * l.state_row_stride + dsv4::kRowWidth;
    l.state = static_cast<float*>(add(words(last * sizeof(float))));
  }

  void k_cache() {
    dsv4::LayerArguments& l = call_.layer;
    l.k_format = in_.flag() ? dsv4::kInt8Hadamard : dsv4::kFp8Pow2;
    l.k_pages = 1 + in_.below(3);
    if (l.k_format == dsv4::kFp8Pow2) {
      constexpr int64_t kBytes = dsv4::kFp8ScaleOffset + 4 * dsv4::kFp8PageEntries;
      l.k_page = dsv4::kFp8PageEntries;
      l.k_page_stride = kBytes + 4 * in_.below(64);
      l.k_cache = add(words((l.k_pages - 1) * l.k_page_stride + kBytes));
      return;
    }
    l.k_page = 1 + in_.below(32);
    l.k_entry_stride = dsv4::kHeadDim + in_.below(3);
    l.k_page_stride = l.k_page * l.k_entry_stride + in_.below(3);
    l.k_cache = add(words(last_entry(l.k_page_stride, l.k_entry_stride) + dsv4::kHeadDim));
    l.k_scale_is_fp16 = in_.flag();
    l.k_scale_entry_stride = 1 + in_.below(2);
    l.k_scale_page_stride = l.k_page * l.k_scale_entry_stride + in_.below(2);
    const int64_t scales = last_entry(l.k_scale_page_stride, l.k_scale_entry_stride) + 1;
    l.k_scale = add(words(scales * (l.k_scale_is_fp16 ? 2 : 4)));
  }

  int64_t last_entry(int64_t page_stride, int64_t entry_stride) const {
    return (call_.layer.k_pages - 1) * page_stride + (call_.layer.k_page - 1) * entry_stride;
  }

  void weights() {
    const dsv4::StepArguments& s = call_.step;
    dsv4::LayerArguments& l = call_.layer;
    // Finite: which of two NaNs a sum keeps is the compiler's choice.
    l.ape = static_cast<float*>(add(floats(dsv4::kRatio * dsv4::kKvWidth, false, kMild, ++seed_)));
    l.norm_weight_is_bf16 = in_.flag();
    l.norm_weight = add(floats(dsv4::kHeadDim, l.norm_weight_is_bf16, kind_, ++seed_));
    l.cos_sin_rows = s.max_pos;
    l.cos_sin_stride = dsv4::kRopeDim + in_.below(2);
    l.cos_sin = static_cast<float*>(
        add(words(((l.cos_sin_rows - 1) * l.cos_sin_stride + dsv4::kRopeDim) * 4)));
    l.eps = in_.flag() ? 1e-6 : 0.0;
    dsv4::KvScore& kv = call_.kv_score;
    kv.tokens = s.tokens;
    kv.is_bf16 = in_.flag();
    kv.stride = dsv4::kRowWidth + in_.below(3);
    kv.rows =
        add(floats((kv.tokens - 1) * kv.stride + dsv4::kRowWidth, kv.is_bf16, kind_, ++seed_));
  }

  // Most tokens follow the one before, and have the slots that their request's table gives them.
  void tokens() {
    dsv4::StepArguments& s = call_.step;
    std::vector<int32_t> table(s.requests * s.block_table_stride), requests(s.tokens);
    std::vector<int64_t> positions(s.tokens), state_slots(s.tokens), k_slots(s.tokens);
    for (int32_t& page : table) page = static_cast<int32_t>(value(1, s.state_pages));
    for (int64_t t = 0; t < s.tokens; ++t) {
      const uint8_t how = in_.byte();
      const bool follows = t > 0 && how & 1 && (wild_ || positions[t - 1] + 1 < s.max_pos);
      const uint64_t position = follows ? positions[t - 1] + 1ull : value(0, s.max_pos);
      const int64_t request = follows ? requests[t - 1] : value(0, s.requests);
      const uint64_t column = position / s.state_page, rest = position % s.state_page;
      const bool mapped =
          request >= 0 && request < s.requests && column < static_cast<uint64_t>(s.table_columns);
      const int64_t page = mapped ? table[request * s.block_table_stride + column] : -1;
      const bool closes = position % dsv4::kRatio == dsv4::kRatio - 1;
      positions[t] = static_cast<int64_t>(position);
      requests[t] = static_cast<int32_t>(request);
      state_slots[t] = how & 2 || page < 0 ? value(-1, s.state_pages * s.state_page)
                                           : page * s.state_page + static_cast<int64_t>(rest);
      k_slots[t] = how & 4 ? value(-1, s.k_entries) : closes ? k_slot(request, position) : -1;
    }
    s.positions = add_values(positions);
    s.token_to_req = add_values(requests);
    s.state_slots = add_values(state_slots);
    s.block_table = add_values(table);
    s.k_slots = add_values(k_slots);
  }

  int64_t k_slot(uint64_t request, uint64_t position) const {
    return static_cast<int64_t>((7 * request + position / dsv4::kRatio) %
                                static_cast<uint64_t>(call_.step.k_entries));
  }

  // In [low, end). Of a wild call also the neighbours, which are out of range, and far numbers.
  int64_t value(int64_t low, int64_t end) {
    constexpr int64_t kFar[] = {INT64_MIN, INT64_MAX, INT32_MIN, INT32_MAX,
                                -2,        -4,        1ll << 62, -256};
    const int64_t b = in_.byte(), sound = std::max<int64_t>(end - low, 1);
    if (!wild_) return low + b % sound;
    return b < 248 ? low - 1 + b % (sound + 2) : kFar[b - 248];
  }

  Input in_;
  uint64_t seed_ = 0;
  Kind kind_ = kMild;
  bool wild_ = false;  // some of the values are out of range
  calls::Call call_{dsv4::kHeadDim, dsv4::kRatio, {}, {}, {}, {}};
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const calls::Call call = Builder(Input(data, size)).build();
  for (const char* algorithm :
       {"one_pass", "one_pass_past_cache", "overlay_scan", "scatter_pool"}) {
    const auto outcome = calls::run_everywhere(call, algorithm, {calls::by_grain, calls::by_five});
    if (outcome.planned < 0 || outcome.stored < 0)
      calls::require(outcome.arrays == call.arrays, "%s was refused, and wrote", algorithm);
    else
      calls::require(outcome.planned == outcome.stored, "%s did not store what it planned",
                     algorithm);
  }
  return 0;
}
