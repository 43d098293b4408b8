// The machine under the emulated calls: the unified buffers, the clocks of the pipes, global
// memory, and the rules.
//
// A kernel runs core after core on the host, and every instruction at once, so the values are those
// of the program order. What the hardware would not promise is found by bookkeeping: who wrote and
// read each 32-byte block last, on which pipe, and what that pipe's instruction is known to come
// after. A broken rule throws `Refusal`.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulation {

struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Args>
[[noreturn]] void refuse(const char* format, Args... args) {
  char text[400];
  std::snprintf(text, sizeof text, format, args...);
  throw Refusal(text);
}

template <class... Args>
void require(bool holds, const char* format, Args... args) {
  if (!holds) refuse(format, args...);
}

// Bytes of a data block, the grain of alignment and of the bookkeeping.
constexpr uint32_t kBlock = 32;

// Usable bytes. A2 and A3: 192 KiB, of which 256 bytes are the framework's and 8 KiB by default the
// API's. A5: 256 KiB less 8. docs/zh/guide, 硬件实现/架构规格/NPU架构版本2201.md;
// SIMD-API/基础API/工具接口/系统资源与变量/GetUBSizeInBytes.md
struct Product {
  const char* name;
  uint32_t usable;
  bool is_950;
};
constexpr Product kProducts[] = {
    {"Ascend910B1", 192 * 1024 - 256 - 8 * 1024, false},
    {"Ascend910_9391", 192 * 1024 - 256 - 8 * 1024, false},
    {"Ascend950PR_9589", 248 * 1024, true},
    {"Ascend910B", 0, false},  // of the first generation
};
constexpr uint32_t kUnifiedBuffer = 256 * 1024;

enum Pipe { kScalar, kVector, kMte2, kMte3, kPipes };
constexpr const char* kPipeNames[] = {"S", "V", "MTE2", "MTE3"};
// Of each pipe, how many instructions are known to be over.
using Clock = std::array<uint32_t, kPipes>;

// Of A2 and A3: blocks that lie as many apart are in one group of banks, which reads one of them a
// cycle, and writes one. docs/zh/guide, 算子实践参考/SIMD算子性能优化/内存访问/避免UB的bank冲突
constexpr uint32_t kBankGroups = 16;

struct Count {
  int64_t instructions = 0;
  int64_t repeats = 0;
  int64_t waits = 0;  // for unfinished ones: to touch what they write, or at a barrier
  int64_t turns = 0;  // of the repeats' busiest bank groups

  void operator+=(const Count& other) {
    instructions += other.instructions, repeats += other.repeats;
    waits += other.waits, turns += other.turns;
  }
};

// What a core has done. Bytes and transfers between global memory and the unified buffer, scalar
// reads of both, tiles of rows.
struct Counts {
  int64_t read_bytes = 0, write_bytes = 0, reads = 0, writes = 0;
  int64_t scalar_local = 0, scalar_global = 0;
  int64_t tiles = 0;
  std::map<std::string, Count> vector, after;  // and of them, apart: after the last tile was stored
};

struct Region {
  const char* name;
  uintptr_t begin, end;
  bool writable;
};

struct Access {
  uintptr_t begin, end;
  int core;
  Pipe pipe;
  uint32_t time;
  Clock clock;
  int64_t sequence;
  bool write;
};

// One core: a unified buffer and four pipes.
class Core {
 public:
  struct Block {
    uint32_t initialised = 0;  // a bit a byte
    uint32_t written = 0;      // time of the last write, on `writer`
    Pipe writer = kScalar;
    Clock read = {};           // time of the last read, by pipe
    uint64_t instruction = 0;  // the last instruction that wrote it
    uint32_t by_address = 0;   // time of the last vector instruction that was given addresses
  };

  int index = 0;
  const Product* product = kProducts;
  Counts counts;
  uint64_t noise = 0;  // not 0: Exp, Div and Sqrt err by up to one ulp, by this seed
  alignas(kBlock) uint8_t memory[kUnifiedBuffer];

  void reset(int core, const Product& on, uint64_t seed) {
    index = core, product = &on, noise = seed, counts = {};
    blocks_.assign(kUnifiedBuffer / kBlock, {});
    time_ = {}, clock_ = {}, drained_ = 0, after_tile_ = false;
    flags_.clear();
    std::memset(memory, 0xa5, sizeof memory);
  }

  // Begins an instruction on `pipe`. With `by_address` it is given addresses, not tensors: the
  // compiler's own barriers between vector instructions are for those that work on tensors.
  void issue(Pipe pipe, bool by_address = false) {
    pipe_ = pipe, by_address_ = by_address;
    ++instruction_;
    ++time_[pipe];
  }

  void issue_vector(const std::string& name, int64_t repeats, bool by_address = false) {
    issue(kVector, by_address);
    count_ = &(after_tile_ ? counts.after : counts.vector)[name];
    count_->instructions += 1, count_->repeats += repeats;
  }

  // A tile of rows is taken into hand, and given away to be stored.
  void begin_tile() {
    ++counts.tiles;
    for (const auto& [name, count] : counts.after) counts.vector[name] += count;
    counts.after.clear();
    after_tile_ = false;
  }
  void end_tile() { after_tile_ = true; }

  void end_repeat() {
    count_->turns += std::max(busiest_group(read_), busiest_group(written_));
    read_.clear(), written_.clear();
  }

  // Reads or writes `bytes` of one block at `address`, by the instruction issued last.
  const uint8_t* read(uint32_t address, uint32_t bytes, const char* what) {
    Block& block = blocks_[address / kBlock];
    const uint32_t wanted = bits(address, bytes);
    require((block.initialised & wanted) == wanted,
            "uninitialised: %s reads unified buffer at %u, which nothing wrote", what, address);
    require(block.instruction != instruction_,
            "overlap: %s reads at %u what an earlier repeat of the same instruction wrote", what,
            address);
    require_after(block.writer, block.written, what, address, "read of a write");
    require_barrier(block, what, address);
    if (pipe_ == kVector) await(block), read_.push_back(address / kBlock);
    block.read[pipe_] = time_[pipe_];
    return memory + address;
  }

  uint8_t* write(uint32_t address, uint32_t bytes, const char* what) {
    Block& block = blocks_[address / kBlock];
    if (block.instruction != instruction_) {
      for (int p = 0; p < kPipes; ++p)
        if (p != pipe_)
          require_after(static_cast<Pipe>(p), block.read[p], what, address, "write over a read");
      require_after(block.writer, block.written, what, address, "write over a write");
      if (by_address_)
        require_after(kVector, block.read[kVector], what, address, "write over a read");
      require_barrier(block, what, address);
      if (pipe_ == kVector) await(block), written_.push_back(address / kBlock);
    }
    block.initialised |= bits(address, bytes);
    block.writer = pipe_, block.written = time_[pipe_], block.instruction = instruction_;
    return memory + address;
  }

  void forget(uint32_t address, uint32_t bytes) {
    for (uint32_t b = address / kBlock; b < (address + bytes) / kBlock; ++b)
      blocks_[b].initialised = 0;
  }

  // SetFlag and WaitFlag: what the source pipe has issued so far is over before the target goes on.
  void set_flag(Pipe from, Pipe to, int id) {
    require(id >= 0 && id < 8, "event: id %d; a product has 0 to 7", id);
    auto [place, fresh] = flags_.insert({{from, to, id}, clock_[from]});
    require(fresh, "event: %s_%s %d is set twice without a wait", kPipeNames[from], kPipeNames[to],
            id);
    place->second[from] = time_[from];
  }

  void wait_flag(Pipe from, Pipe to, int id) {
    auto flag = flags_.find({from, to, id});
    require(flag != flags_.end(), "event: %s waits for %s %d, which is not set", kPipeNames[to],
            kPipeNames[from], id);
    for (int p = 0; p < kPipes; ++p) clock_[to][p] = std::max(clock_[to][p], flag->second[p]);
    flags_.erase(flag);
  }

  void barrier(Pipe pipe) {
    if (pipe == kVector && finished() < time_[kVector]) ++count_->waits;
    clock_[pipe][pipe] = time_[pipe];
  }
  void barrier_all() { clock_.fill(time_); }

  void finish() const {
    require(flags_.empty(), "event: a flag is left set at the end of the kernel");
  }

  // Whether a memory access of the instruction issued last is known to come after instruction
  // `time` of `pipe`. The vector pipe waits for itself (the compiler inserts that barrier); the
  // transfer pipes may overtake themselves. SIMD-API/基础API/同步控制/核内同步/关键特性说明.md;
  // PipeBarrier(ISASI).md
  uint32_t known(Pipe pipe) const {
    const bool own = pipe == pipe_, ordered = pipe == kVector ? !by_address_ : pipe == kScalar;
    return own && ordered ? time_[pipe] : clock_[pipe_][pipe];
  }

  Access access(uintptr_t begin, uintptr_t end, int64_t sequence, bool write) const {
    Clock clock;
    for (int p = 0; p < kPipes; ++p) clock[p] = known(static_cast<Pipe>(p));
    return {begin, end, index, pipe_, time_[pipe_], clock, sequence, write};
  }

 private:
  static uint32_t bits(uint32_t address, uint32_t bytes) {
    const uint32_t run = bytes >= kBlock ? ~0u : (1u << bytes) - 1;
    return run << (address % kBlock);
  }

  // The vector unit begins one instruction while others are unfinished, but not one that touches
  // what they write: then all of them end first.
  void await(const Block& block) {
    if (block.writer != kVector || block.written <= finished() || block.written == time_[kVector])
      return;
    ++count_->waits;
    drained_ = time_[kVector] - 1;
  }

  // Vector instructions that are over when the next one begins, by a wait, a barrier or a flag.
  uint32_t finished() const { return std::max(drained_, clock_[kVector][kVector]); }

  static int64_t busiest_group(std::vector<uint32_t>& blocks) {
    std::sort(blocks.begin(), blocks.end());
    blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
    std::array<int64_t, kBankGroups> turns = {};
    for (uint32_t block : blocks) ++turns[block % kBankGroups];
    return *std::max_element(turns.begin(), turns.end());
  }

  void require_barrier(Block& block, const char* what, uint32_t address) {
    if (pipe_ == kVector && block.by_address > clock_[kVector][kVector])
      refuse(
          "order: %s on V at %u follows an instruction that was given addresses, without "
          "PipeBarrier<PIPE_V>",
          what, address);
    if (by_address_) block.by_address = time_[pipe_];
  }

  void require_after(Pipe pipe, uint32_t time, const char* what, uint32_t address,
                     const char* which) {
    if (known(pipe) < time)
      refuse("order: %s on %s at %u is a %s by %s, with nothing between them", what,
             kPipeNames[pipe_], address, which, kPipeNames[pipe]);
  }

  std::vector<Block> blocks_;
  Clock time_ = {};                       // instructions issued, by pipe
  std::array<Clock, kPipes> clock_ = {};  // what each pipe knows to be over, of itself too
  std::map<std::array<int, 3>, Clock> flags_;
  Pipe pipe_ = kScalar;
  bool by_address_ = false;
  uint64_t instruction_ = 0;
  bool after_tile_ = false;
  Count* count_ = nullptr;                // of the vector instruction issued last
  uint32_t drained_ = 0;                  // vector instructions that a later one waited for
  std::vector<uint32_t> read_, written_;  // blocks of the repeat in hand
};

// The data caches of the scalar units, one a core. A line holds what it was loaded with until it is
// invalidated. In each launch it begins with the bytes of an earlier one, which are never right
// here: so a missing invalidation is seen whatever the allocator does. A store goes through to
// memory.
class DataCaches {
 public:
  static constexpr uintptr_t kLine = 64;

  void begin_launch() { lines_.clear(); }

  void load(int core, uintptr_t address, size_t bytes, void* value) {
    Line& line = line_of(core, address);
    if (!line.valid) std::memcpy(line.bytes.data(), host(address / kLine * kLine), kLine);
    line.valid = true;
    std::memcpy(value, line.bytes.data() + address % kLine, bytes);
  }

  void store(int core, uintptr_t address, size_t bytes, const void* value) {
    std::memcpy(line_of(core, address).bytes.data() + address % kLine, value, bytes);
    std::memcpy(host(address), value, bytes);
  }

  void invalidate(int core, uintptr_t address) { line_of(core, address).valid = false; }

 private:
  struct Line {
    Line() { bytes.fill(0xa5); }
    bool valid = true;
    std::array<uint8_t, kLine> bytes;
  };

  static uint8_t* host(uintptr_t address) { return reinterpret_cast<uint8_t*>(address); }
  Line& line_of(int core, uintptr_t address) { return lines_[{core, address / kLine}]; }

  std::map<std::pair<int, uintptr_t>, Line> lines_;
};

// What all cores of a launch share.
class Memory {
 public:
  std::vector<Region> regions;

  void begin_launch() { accesses_.clear(), scalar_stores_.clear(), sequence_ = 0; }

  // One piece of global memory, accessed by the instruction that `core` issued last.
  void touch(Core& core, uintptr_t begin, uint64_t bytes, bool write, const char* what,
             bool scalar = false) {
    const uintptr_t end = begin + bytes;
    const Region* region = nullptr;
    for (const Region& r : regions)
      if (begin >= r.begin && end <= r.end) region = &r;
    if (!region)
      refuse("bounds: %s touches %llu bytes of global memory outside every tensor", what,
             (unsigned long long)bytes);
    require(region->writable || !write, "bounds: %s writes %s, an input", what, region->name);
    if (!region->writable) return;
    accesses_.push_back(core.access(begin, end, sequence_++, write));
    if (scalar && write) scalar_stores_.push_back({begin / DataCaches::kLine, core.index});
  }

  // Conflicts between cores, and within a core between transfers that nothing orders.
  void end_launch() {
    std::sort(accesses_.begin(), accesses_.end(),
              [](auto& a, auto& b) { return a.begin < b.begin; });
    for (size_t i = 0; i < accesses_.size(); ++i)
      for (size_t j = i + 1; j < accesses_.size() && accesses_[j].begin < accesses_[i].end; ++j)
        judge(accesses_[i], accesses_[j]);
    // The data cache writes back whole lines: SIMD-API/基础API/数据结构/GlobalTensor/SetValue.md
    std::map<uintptr_t, int> owner;
    for (auto [line, core] : scalar_stores_) {
      const int first = owner.insert({line, core}).first->second;
      require(first == core, "cache line: cores %d and %d store scalars in one line of %d bytes",
              first, core, (int)DataCaches::kLine);
    }
  }

 private:
  static void judge(const Access& a, const Access& b) {
    if (!a.write && !b.write) return;
    if (a.core != b.core)
      refuse("conflict: core %d %s global memory that core %d %s in the same launch", a.core,
             a.write ? "writes" : "reads", b.core, b.write ? "writes" : "reads");
    const Access &first = a.sequence < b.sequence ? a : b,
                 &second = a.sequence < b.sequence ? b : a;
    require(second.clock[first.pipe] >= first.time,
            "order: two transfers of one core meet in global memory (%s, then %s), with nothing "
            "between them",
            kPipeNames[first.pipe], kPipeNames[second.pipe]);
  }

  std::vector<Access> accesses_;
  std::vector<std::pair<uintptr_t, int>> scalar_stores_;
  int64_t sequence_ = 0;
};

inline Core core;
inline Memory memory;
inline DataCaches data_caches;
inline int64_t block_count = 1;  // cores of the launch

}  // namespace emulation
