// `driver ALGORITHM BYTES` runs the op once. On stdin: dsv4::Arguments with offsets where addresses belong, then the
// BYTES of memory that they are offsets into. On stdout: how many entries the op stored, then the memory.

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "../../csrc/cpu/abi.h"

extern "C" int64_t (*dsv4_indexer_compress_for(const char* algorithm, const char* isa))(
    const dsv4::Arguments*, dsv4::Violation*);

static int32_t serial_for(int64_t begin, int64_t end, int64_t grain, dsv4::Task task, void* context) {
  for (; begin < end; begin += grain) task(begin, std::min(begin + grain, end), context);
  return 0;
}

template <class... Pointer>
static void relocate(char* memory, Pointer&... offset) {
  ((offset = reinterpret_cast<Pointer>(memory + reinterpret_cast<intptr_t>(offset))), ...);
}

int main(int, char** argv) {
  const size_t bytes = std::strtoull(argv[2], nullptr, 10);
  char* const memory = static_cast<char*>(std::aligned_alloc(64, bytes));
  dsv4::Arguments a;
  if (std::fread(&a, sizeof a, 1, stdin) != 1 || std::fread(memory, 1, bytes, stdin) != bytes) return 1;
  a.parallel_for = serial_for;
  relocate(memory, a.kv_score, a.ape, a.norm_weight, a.cos_sin, a.positions, a.token_to_req, a.state_slots,
           a.block_table, a.state, a.k_slots, a.k_cache, a.k_scale);
  dsv4::Violation violation;
  const int64_t entries = dsv4_indexer_compress_for(argv[1], "generic")(&a, &violation);
  std::fwrite(&entries, sizeof entries, 1, stdout);
  return std::fwrite(memory, 1, bytes, stdout) == bytes ? 0 : 1;
}
