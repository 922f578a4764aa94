// device/attention.cuh, as written for Hopper, on emulated CTAs: planning warp, producer and compute warpgroups.
//
// The step's own keys and values are missing in the cache until all CTAs are about to begin the op; then they are there, and the grid barrier before the op is
// passed. The ring starts at a stage chosen by chance. Test: pytest tests/host/test_attention_sm90_simt.py
#include <attention.cuh>

#include <grid.h>

#include <array>

namespace {

using namespace blinkimp;

constexpr u32 kAttentionOffset = kSharedOffset + sizeof(WorkerShared);
static_assert(kAttentionOffset + sizeof(AttentionShared) <= sizeof(dynamic_shared), "the map ends here");

// What the last step's warpgroups had of the narrow pages of the first window: [num_workers, 2] of (kv head, page, number of pages).
std::vector<std::array<u32, 3>> narrow_ranges;
u32 num_owners = 0;

constexpr u32 kPassesATurn = 64;

struct PlainStore {
  u16* output;  // [rows, num_heads * head_dim]
  u32 row_stride;
  void chunk(u32 row, u32 column, uint4 words) const { std::memcpy(output + static_cast<u64>(row) * row_stride + column, &words, 16); }
  void pair(u32 row, u32 column, u32 word) const { std::memcpy(output + static_cast<u64>(row) * row_stride + column, &word, 4); }
};

// new_rows: [rows, num_kv_heads, 2, head_dim], or null: NaN.
template <int kHeadDim>
void write_new_rows(const EngineParams& params, const Op& op, const StepPlan* plan, const u16* new_rows) {
  for (u32 row = 0; row < plan->num_rows; ++row) {
    const PlanRow& where = plan_rows(params, plan)[row];
    const u32 page_id = page_table_of(params, plan_seqs(params, plan)[where.seq_idx].request_idx)[where.position / kPageTokens];
    for (u32 kv_head = 0; kv_head < params.dims.num_kv_heads; ++kv_head) {
      u8* tile = const_cast<u8*>(kv_tile<kHeadDim>(params, op.layer, page_id, kv_head));
      for (u32 i = 0; i < 2 * kHeadDim; ++i) {
        const u16 value = new_rows ? new_rows[(row * params.dims.num_kv_heads + kv_head) * 2 * kHeadDim + i] : 0xffff;
        std::memcpy(tile + i / kHeadDim * kKvTileBytes<kHeadDim> + kv_byte_offset(where.position % kPageTokens, i % kHeadDim), &value, 2);
      }
    }
  }
}

// What the compute threads of a CTA wait for before the op: the harness, which writes the step's own rows when all CTAs have got so far.
struct Opening {
  u32 num_ready = 0;
  bool is_open = false;
};

template <int kHeadDim>
void run_thread(const EngineParams& params, u32 first_stage, Opening& opening, RingCursor* produced, RingCursor* consumed, u16* output) {
  const StepPlan* plan = reinterpret_cast<const StepPlan*>(params.plans[0]);
  const Op& op = *reinterpret_cast<const Op*>(params.ops);
  u8* shared_memory = worker_memory();
  WorkerShared& shared = worker_shared(shared_memory);
  AttentionShared& attention = *reinterpret_cast<AttentionShared*>(shared_memory + kAttentionOffset);
  if (is_first_thread()) {
    for (u32 i = 0; i < kWeightStages; ++i) {
      mbarrier_init(&shared.weights_full[i], 1);
      mbarrier_init(&shared.weights_empty[i], 2);
      if (i < first_stage) {  // has been through one lap
        simt90::barriers[&shared.weights_full[i]].phases.generation = 1;
        simt90::barriers[&shared.weights_empty[i]].phases.generation = 1;
      }
    }
    mbarrier_init(&attention.schedule_ready, 1);
    shared.compute = ComputeState{};
  }
  __syncthreads();
  if (thread_idx() < kComputeThreads) {
    prepare_attention<kHeadDim>(params, op, plan, 0, shared_memory, attention);
    if (is_first_thread()) {
      opening.num_ready++;
      while (!opening.is_open) simt::machine.wait(simt90::grid);
    }
    named_barrier_sync<1, kComputeThreads>();
    const RingCursor cursor = attend<kHeadDim>(params, shared_memory, shared, attention, RingCursor{first_stage, 0}, PlainStore{output, params.dims.num_heads * kHeadDim});
    if (is_first_thread()) *consumed = cursor;
  } else if (thread_idx() == kComputeThreads) {
    // The narrow pages are not to wait for the op's beginning: they are produced before it, unless the ring is full.
    RingCursor cursor{first_stage, 1};
    produce_attention<kHeadDim>(params, op, plan, 0, shared_memory, shared, attention, cursor, 1);
    *produced = cursor;
  } else if (thread_idx() / 32 == 10) {
    find_windows(params, attention);
    plan_attention(params, plan, attention);
  }
}

// Of a CTA that is done, in the globals.
template <int kHeadDim>
void check_cta(const RingCursor& produced, const RingCursor& consumed) {
  const AttentionShared& attention = *reinterpret_cast<AttentionShared*>(worker_memory() + kAttentionOffset);
  const AttentionState& state = attention_state<kHeadDim>(worker_memory());
  for (u32 i = 0; i < 2; ++i) {
    const NarrowWalk& range = attention.windows[0].narrow[i];
    narrow_ranges.at(2 * simt90::cta_idx + i) = {range.kv_head, range.page, range.num_pages};
    for (const AttentionRun& run : state.runs[i]) num_owners += run.kind == kRunNarrow && run.tasks_each != 0 && run.first_task != kNoTask;
    if (attention.windows[0].most_range_pages < range.num_pages) simt::fail("pages of a range, above the most", range.num_pages, attention.windows[0].most_range_pages);
  }
  if (!simt90::copies.empty()) simt::fail("bulk copies that nobody waited for", simt90::copies.size(), 0);
  if (consumed.stage != produced.stage || consumed.phase == produced.phase) simt::fail("ring stage of the consumers at the op's end", consumed.stage, produced.stage);
  for (const auto& [address, barrier] : simt90::barriers) {
    if (barrier.num_pending != barrier.num_expected || barrier.num_bytes != 0) simt::fail("mbarrier left in the middle of a phase", barrier.num_pending, barrier.num_expected);
  }
  for (const simt::Rendezvous& barrier : simt::machine.barriers) {
    if (barrier.num_arrived != 0) simt::fail("named barrier left with arrivals", barrier.num_arrived, 0);
  }
}

template <int kHeadDim>
void run_step(const EngineParams& params, const u16* new_rows, u16* output, u32 seed) {
  const StepPlan* plan = reinterpret_cast<const StepPlan*>(params.plans[0]);
  const Op& op = *reinterpret_cast<const Op*>(params.ops);
  write_new_rows<kHeadDim>(params, op, plan, nullptr);
  *grid_word(params, kGridWordArrivals) = 0;
  narrow_ranges.assign(2 * params.num_workers, {});
  num_owners = 0;
  std::mt19937 random(seed);
  std::vector<u32> first_stages(params.num_workers);
  for (u32& stage : first_stages) stage = random() % kWeightStages;
  std::vector<RingCursor> produced(params.num_workers);
  std::vector<RingCursor> consumed(params.num_workers);
  Opening opening;
  simt90::run_grid(params.num_workers, kWorkerThreads, seed, [&] {
    const u32 cta = simt90::cta_idx;
    run_thread<kHeadDim>(params, first_stages[cta], opening, &produced[cta], &consumed[cta], output);
  }, [&] {
    if (opening.is_open || opening.num_ready < params.num_workers) return false;
    write_new_rows<kHeadDim>(params, op, plan, new_rows);
    *grid_word(params, kGridWordArrivals) = params.num_workers;
    opening.is_open = true;
    ++simt90::grid.generation;
    return true;
  }, kPassesATurn);
  for (u32 cta = 0; cta < params.num_workers; ++cta) {
    simt90::swap_cta(cta);
    check_cta<kHeadDim>(produced[cta], consumed[cta]);
    simt90::swap_cta(cta);
  }
}

}  // namespace

extern "C" int bk_attention_sm90_simt(const blinkimp::EngineParams* params, const unsigned short* new_rows, unsigned short* output, unsigned int seed) {
  if (params->dims.head_dim == 64) run_step<64>(*params, new_rows, output, seed);
  else if (params->dims.head_dim == 128) run_step<128>(*params, new_rows, output, seed);
  else return -1;
  return 0;
}

// Runs of the last step that owned a part of their unit's fold.
extern "C" unsigned bk_num_owners() { return num_owners; }

// Bytes of all bulk copies since the library was loaded.
extern "C" unsigned long long bk_copied_bytes() { return simt90::num_copied_bytes; }

// ranges: [num_workers, 2, 3], as narrow_ranges.
extern "C" void bk_narrow_ranges(unsigned int* ranges) { std::memcpy(ranges, narrow_ranges.data(), narrow_ranges.size() * sizeof(narrow_ranges[0])); }
