// `driver ALGORITHM BYTES` plans a step and runs one layer. On stdin: dsv4::StepArguments,
// LayerArguments and KvScore with offsets where addresses belong, then the BYTES of memory that
// they are offsets into. On stdout: how many entries the layer stored, then the memory.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/abi.h"
#include "../../csrc/plan.h"

using Run = int64_t (*)(const dsv4::LayerArguments*, dsv4::ParallelFor, const int64_t* plan,
                        const dsv4::KvScore*);
extern "C" {
int64_t dsv4_indexer_plan(const dsv4::StepArguments*, int64_t rule, int64_t* plan,
                          dsv4::Violation*);
Run dsv4_indexer_run_for(const char* algorithm, const char* isa);
}

static int32_t serial_for(int64_t begin, int64_t end, int64_t grain, dsv4::Task task,
                          void* context) {
  for (; begin < end; begin += grain) task(begin, std::min(begin + grain, end), context);
  return 0;
}

template <class... Pointer>
static void relocate(char* memory, Pointer&... offset) {
  ((offset = reinterpret_cast<Pointer>(memory + reinterpret_cast<intptr_t>(offset))), ...);
}

template <class T>
static T received() {
  T value;
  if (std::fread(&value, sizeof value, 1, stdin) != 1) std::exit(1);
  return value;
}

int main(int, char** argv) {
  const size_t bytes = std::strtoull(argv[2], nullptr, 10);
  char* const memory = static_cast<char*>(std::aligned_alloc(64, bytes));
  auto step = received<dsv4::StepArguments>();
  auto layer = received<dsv4::LayerArguments>();
  auto kv_score = received<dsv4::KvScore>();
  if (std::fread(memory, 1, bytes, stdin) != bytes) return 1;
  relocate(memory, step.positions, step.token_to_req, step.state_slots, step.block_table,
           step.k_slots, layer.ape, layer.norm_weight, layer.cos_sin, layer.state, layer.k_cache,
           layer.k_scale, kv_score.rows);
  std::vector<int64_t> plan(dsv4::kPlanHeader + dsv4::kPlanWidth * step.tokens);
  dsv4::Violation violation;
  const bool one_pass = !std::strcmp(argv[1], "one_pass");
  if (dsv4_indexer_plan(&step, one_pass ? dsv4::kRowRule : dsv4::kStateOnly, plan.data(),
                        &violation) < 0)
    return 2;
  const int64_t entries =
      dsv4_indexer_run_for(argv[1], "generic")(&layer, serial_for, plan.data(), &kv_score);
  std::fwrite(&entries, sizeof entries, 1, stdout);
  std::fwrite(memory, 1, bytes, stdout);
}
