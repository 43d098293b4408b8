// The emulation as a library with the C interface of csrc/ascend/abi.h, and calls for the tests:
// which machine, what it counted, and the kernels that break a rule each (rules.cpp).
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
  bool failing = false;  // every launch fails, as far as the runtime is concerned

  Device device() const { return {product->name, built_for}; }
} machine;

std::vector<std::vector<emulation::Counts>> launches;  // counts of each core of each launch

// The tensors behind the arguments.
class Regions {
 public:
  void add(const char* name, uint64_t address, int64_t bytes, bool writable = false) {
    if (address && bytes > 0) all_.push_back({name, address, address + bytes, writable});
  }
  std::vector<Region> take() { return std::move(all_); }

 private:
  std::vector<Region> all_;
};

int64_t plan_bytes(int64_t tokens) { return plan_size(tokens, kRatio) * 8; }

std::vector<Region> regions_of(const PlanArguments& a, bool by_requests) {
  Regions regions;
  const auto table = [&](const char* name, uint64_t address, int64_t stride, int64_t columns) {
    if (columns > 0) regions.add(name, address, ((a.requests - 1) * stride + columns) * 4);
  };
  regions.add("plan", a.plan, plan_bytes(a.tokens), true);
  table("inner_state_block_table", a.block_table, a.block_table_stride, a.table_columns);
  if (by_requests) {
    regions.add("query_start_loc", a.query_start_loc, (a.requests + 1) * 4);
    regions.add("start_pos", a.start_pos, a.requests * 4);
    table("k_block_table", a.k_table, a.k_table_stride, a.k_columns);
    regions.add("slot_mapping", a.slot_mapping, ((a.tokens - 1) * a.slot_mapping_stride + 1) * 4);
  } else {
    regions.add("positions", a.positions, a.tokens * 8);
    regions.add("token_to_req", a.token_to_req, a.tokens * 4);
    regions.add("inner_state_slot_mapping", a.state_slots, a.tokens * 8);
    regions.add("k_slot_mapping", a.k_slots, a.tokens * 8);
  }
  return regions.take();
}

std::vector<Region> regions_of(const RunArguments& a) {
  Regions regions;
  const bool fp8 = a.k_format == kFp8Amax, bf16 = a.k_format == kBf16;
  const int64_t kv_width = 2 * a.head_dim, row_width = 2 * kv_width;
  regions.add("kv_score", a.kv_score, ((a.tokens - 1) * a.kv_score_stride + row_width) * 4);
  regions.add("plan", a.plan, plan_bytes(a.tokens));
  regions.add("ape", a.ape, kRatio * kv_width * 4);
  regions.add("norm_weight", a.norm_weight, a.head_dim * (a.norm_weight_is_bf16 ? 2 : 4));
  regions.add("cos_sin_cache", a.cos_sin, ((a.cos_sin_rows - 1) * a.cos_sin_stride + kRopeDim) * 4);
  regions.add("inner_state_cache", a.state,
              ((a.state_pages - 1) * a.state_page_stride + (a.state_page - 1) * a.state_row_stride +
               row_width) *
                  4,
              true);
  regions.add("k_cache", a.k_cache,
              ((a.k_pages - 1) * a.k_page_stride + (a.k_page - 1) * a.k_entry_stride + a.head_dim) *
                      (bf16 ? 2 : 1) +
                  (fp8 ? a.k_page * 4 : 0),
              true);
  if (!fp8 && !bf16)
    regions.add(
        "k_scale_cache", a.k_scale,
        ((a.k_pages - 1) * a.k_scale_page_stride + (a.k_page - 1) * a.k_scale_entry_stride + 1) *
            (a.k_scale_is_fp16 ? 2 : 4),
        true);
  return regions.take();
}

// Runs `kernel` on every core, in an order of its own: no result may depend on it.
template <class F>
void launch(int64_t cores, F kernel) {
  std::vector<int> order(cores);
  for (int i = 0; i < cores; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), std::mt19937_64(machine.order));
  emulation::block_count = cores;
  emulation::memory.begin_launch();
  emulation::data_caches.begin_launch();
  launches.emplace_back(cores);
  for (int core : order) {
    emulation::core.reset(core, *machine.product, machine.noise);
    kernel();
    emulation::core.finish();
    launches.back()[core] = emulation::core.counts;
  }
  emulation::memory.end_launch();
}

template <LayerKernel kKernel>
void launch_run(const RunArguments& a) {
  const Tiling tiling = cut(a.tokens, machine.cores);
  launch(tiling.cores, [&] {
    if (a.k_format == kFp8Amax)
      run<kKernel, Indexer, kFp8Amax>(a, tiling);
    else if (a.k_format == kInt8Hadamard)
      run<kKernel, Indexer, kInt8Hadamard>(a, tiling);
    else if constexpr (kKernel == kOnePass)
      run<kOnePass, Main4, kBf16>(a, tiling);
  });
}

template <class F>
int64_t reporting(char* message, int64_t size, F work) {
  if (machine.failing) {
    std::snprintf(message, size, "the launch of an emulated kernel failed, as it was told to");
    return kFailed;
  }
  try {
    work();
    return kDone;
  } catch (const emulation::Refusal& refusal) {
    std::snprintf(message, size, "%s", refusal.what());
    return kRefused;
  }
}

template <class Tokens>
int64_t launch_plan(const PlanArguments& a, char* message, int64_t size) {
  const bool by_requests = std::is_same_v<Tokens, RequestTokens>;
  if (unsupported(a, by_requests, machine.device(), message, size)) return kRefused;
  emulation::memory.regions = regions_of(a, by_requests);
  const Tiling tiling = cut(a.tokens, machine.cores);
  return reporting(message, size, [&] { launch(tiling.cores, [&] { plan<Tokens>(a, tiling); }); });
}

std::string json(const std::map<std::string, emulation::Count>& vector) {
  std::ostringstream out;
  const char* comma = "";
  for (const auto& [name, n] : vector) {
    out << comma << "\"" << name << "\":[" << n.instructions << "," << n.repeats << "," << n.waits
        << "," << n.turns << "]";
    comma = ",";
  }
  return "{" + out.str() + "}";
}

std::string json(const emulation::Counts& n) {
  std::ostringstream out;
  out << "{\"read_bytes\":" << n.read_bytes << ",\"write_bytes\":" << n.write_bytes
      << ",\"reads\":" << n.reads << ",\"writes\":" << n.writes
      << ",\"scalar_local\":" << n.scalar_local << ",\"scalar_global\":" << n.scalar_global
      << ",\"tiles\":" << n.tiles << ",\"vector\":" << json(n.vector)
      << ",\"after\":" << json(n.after) << "}";
  return out.str();
}

template <class T>
std::string json(const std::vector<T>& list) {
  std::string out;
  for (const T& item : list) out += (out.empty() ? "" : ",") + json(item);
  return "[" + out + "]";
}

}  // namespace

extern "C" {

int64_t dsv4_indexer_ascend_plan(const PlanArguments* arguments, void*, char* message,
                                 int64_t size) {
  return launch_plan<ListedTokens>(*arguments, message, size);
}

int64_t dsv4_indexer_ascend_plan_requests(const PlanArguments* arguments, void*, char* message,
                                          int64_t size) {
  return launch_plan<RequestTokens>(*arguments, message, size);
}

int64_t dsv4_indexer_ascend_run(const char* algorithm, const RunArguments* arguments, void*,
                                char* message, int64_t size) {
  if (unsupported(*arguments, machine.device(), message, size)) return kRefused;
  emulation::memory.regions = regions_of(*arguments);
  return reporting(message, size, [&] {
    const bool known = for_each_launch(algorithm, arguments->head_dim, [&](auto kernel) {
      launch_run<kernel.kKernel>(*arguments);
    });
    emulation::require(known, "no algorithm %s for the head dimension %d", algorithm,
                       (int)arguments->head_dim);
  });
}

// `product` by its place in emulation::kProducts. `noise`, `order`: see machine.h and launch().
void emulation_configure(int64_t product, int64_t cores, uint64_t noise, uint64_t order,
                         int64_t built_for, int64_t failing) {
  machine = {&emulation::kProducts[product], cores, noise, order, built_for, failing != 0};
  launches.clear();
}

// How the host cuts `tokens` among `vector_cores`: the tokens of a core, and how many cores that
// takes.
void emulation_cut(int64_t tokens, int64_t vector_cores, int64_t* tokens_per_core, int64_t* cores) {
  const Tiling tiling = cut(tokens, vector_cores);
  *tokens_per_core = tiling.tokens_per_core, *cores = tiling.cores;
}

// The counts since the last emulation_configure: a list of launches, each a list of cores.
int64_t emulation_counts(char* out, int64_t size) {
  return std::snprintf(out, size, "%s", json(launches).c_str());
}

// Runs one of the kernels of rules.h on `cores` cores, with `bytes` of global memory to write and
// as many to read.
int64_t emulation_run_rule(const char* name, int64_t cores, char* message, int64_t size) {
  alignas(64) static uint8_t input[65536], output[65536];
  emulation::memory.regions = {
      {"input", (uintptr_t)input, (uintptr_t)(input + sizeof input), false},
      {"output", (uintptr_t)output, (uintptr_t)(output + sizeof output), true}};
  return reporting(message, size, [&] {
    const auto rule = rules::kernels().find(name);
    emulation::require(rule != rules::kernels().end(), "no rule %s", name);
    launch(cores, [&] { rule->second(input, output); });
  });
}
}
