// The emulation as a library with the C interface of csrc/ascend/abi.h, and calls for the tests: which machine, what it
// counted, and the kernels that break a rule each (rules.cpp).
#include "kernel_operator.h"

#include <random>
#include <sstream>

#include "../../csrc/ascend/launch.h"
#include "rules.h"

namespace {

using namespace dsv4;
using emulation::Region;

struct Machine {
  const emulation::Product* product = emulation::kProducts;
  int64_t cores = 48;
  uint64_t noise = 0, order = 0;
  int64_t built_for = 2201;
} machine;

std::vector<std::vector<emulation::Counts>> launches;  // counts of each core of each launch

std::vector<Region> regions_of(const Arguments& a) {
  std::vector<Region> regions;
  auto add = [&](const char* name, uint64_t address, int64_t bytes, bool writable = false) {
    if (bytes > 0) regions.push_back({name, address, address + bytes, writable});
  };
  const bool fp8 = a.k_format == kFp8Amax;
  add("kv_score", a.kv_score, ((a.tokens - 1) * a.kv_score_stride + kRowWidth) * 4);
  add("ape", a.ape, kRatio * kKvWidth * 4);
  add("norm_weight", a.norm_weight, kHeadDim * (a.norm_weight_is_bf16 ? 2 : 4));
  add("cos_sin_cache", a.cos_sin, ((a.cos_sin_rows - 1) * a.cos_sin_stride + kRopeDim) * 4);
  add("positions", a.positions, a.tokens * 8);
  add("token_to_req", a.token_to_req, a.tokens * 4);
  add("inner_state_slot_mapping", a.state_slots, a.tokens * 8);
  add("k_slot_mapping", a.k_slots, a.tokens * 8);
  if (a.table_columns > 0)
    add("inner_state_block_table", a.block_table, ((a.requests - 1) * a.block_table_stride + a.table_columns) * 4);
  add("inner_state_cache", a.state,
      ((a.state_pages - 1) * a.state_page_stride + (a.state_page - 1) * a.state_row_stride + kRowWidth) * 4, true);
  add("k_cache", a.k_cache,
      (a.k_pages - 1) * a.k_page_stride + (a.k_page - 1) * a.k_entry_stride + kHeadDim + (fp8 ? a.k_page * 4 : 0),
      true);
  if (!fp8)
    add("k_scale_cache", a.k_scale,
        ((a.k_pages - 1) * a.k_scale_page_stride + (a.k_page - 1) * a.k_scale_entry_stride + 1) *
            (a.k_scale_is_fp16 ? 2 : 4),
        true);
  return regions;
}

// Runs `kernel` on every core, in an order of its own: no result may depend on it.
template <class F>
void launch(int64_t cores, F kernel) {
  std::vector<int> order(cores);
  for (int i = 0; i < cores; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), std::mt19937_64(machine.order));
  emulation::block_count = cores;
  emulation::memory.begin_launch();
  launches.emplace_back(cores);
  for (int core : order) {
    emulation::core.reset(core, *machine.product, machine.noise);
    kernel();
    emulation::core.finish();
    launches.back()[core] = emulation::core.counts;
  }
  emulation::memory.end_launch();
}

template <Algorithm kAlgorithm>
void launch_compress(const Arguments& a) {
  const Tiling tiling = cut(a.tokens, machine.cores);
  launch(tiling.cores, [&] {
    if (a.k_format == kFp8Amax)
      run<kAlgorithm, kFp8Amax>(a, tiling);
    else
      run<kAlgorithm, kInt8Hadamard>(a, tiling);
  });
}

template <class F>
int64_t reporting(char* message, int64_t size, F work) {
  try {
    work();
    return 0;
  } catch (const emulation::Refusal& refusal) {
    std::snprintf(message, size, "%s", refusal.what());
    return 1;
  }
}

std::string counts_json() {
  std::ostringstream out;
  out << "[";
  for (size_t l = 0; l < launches.size(); ++l) {
    out << (l ? ",[" : "[");
    for (size_t c = 0; c < launches[l].size(); ++c) {
      const emulation::Counts& n = launches[l][c];
      out << (c ? "," : "") << "{\"read_bytes\":" << n.read_bytes << ",\"write_bytes\":" << n.write_bytes
          << ",\"reads\":" << n.reads << ",\"writes\":" << n.writes << ",\"scalar_local\":" << n.scalar_local
          << ",\"scalar_global\":" << n.scalar_global << ",\"vector\":{";
      const char* comma = "";
      for (const auto& [name, count] : n.vector) {
        out << comma << "\"" << name << "\":[" << count.instructions << "," << count.repeats << "]";
        comma = ",";
      }
      out << "}}";
    }
    out << "]";
  }
  out << "]";
  return out.str();
}

}  // namespace

extern "C" {

int64_t dsv4_indexer_ascend_arguments_size() { return sizeof(Arguments); }

int64_t dsv4_indexer_ascend_compress(const char* algorithm, const Arguments* arguments, void*, char* message,
                                     int64_t size) {
  if (unsupported(*arguments, machine.product->name, machine.built_for, message, size)) return 1;
  emulation::memory.regions = regions_of(*arguments);
  return reporting(message, size, [&] {
    const bool known = for_each_launch(algorithm, [&](auto kernel) { launch_compress<kernel.kAlgorithm>(*arguments); });
    emulation::require(known, "no algorithm %s", algorithm);
  });
}

// `product` by its place in emulation::kProducts. `noise` and `order`: see machine.h and launch().
void emulation_configure(int64_t product, int64_t cores, uint64_t noise, uint64_t order, int64_t built_for) {
  machine = {&emulation::kProducts[product], cores, noise, order, built_for};
  launches.clear();
}

// How the host cuts `tokens` among `vector_cores`: the tokens of a core, and how many cores that takes.
void emulation_cut(int64_t tokens, int64_t vector_cores, int64_t* tokens_per_core, int64_t* cores) {
  const Tiling tiling = cut(tokens, vector_cores);
  *tokens_per_core = tiling.tokens_per_core, *cores = tiling.cores;
}

// The counts since the last emulation_configure: a list of launches, each a list of cores.
int64_t emulation_counts(char* out, int64_t size) { return std::snprintf(out, size, "%s", counts_json().c_str()); }

// Runs one of the kernels of rules.h on `cores` cores, with `bytes` of global memory to write and as many to read.
int64_t emulation_run_rule(const char* name, int64_t cores, char* message, int64_t size) {
  alignas(64) static uint8_t input[65536], output[65536];
  emulation::memory.regions = {{"input", (uintptr_t)input, (uintptr_t)(input + sizeof input), false},
                               {"output", (uintptr_t)output, (uintptr_t)(output + sizeof output), true}};
  return reporting(message, size, [&] {
    const auto rule = rules::kernels().find(name);
    emulation::require(rule != rules::kernels().end(), "no rule %s", name);
    launch(cores, [&] { rule->second(input, output); });
  });
}
}
