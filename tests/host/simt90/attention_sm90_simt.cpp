// device/attention.cuh, as written for Hopper, on an emulated CTA: planning warp, producer and compute warpgroups, CTA after CTA in any order.
//
// Each CTA starts with the step's own keys and values missing in the cache; its compute threads put them there and then pass the grid
// barrier. The ring starts at a stage chosen by chance. Test: pytest tests/host/test_attention_sm90_simt.py
#include <attention.cuh>

#include <array>

namespace {

using namespace blinkimp;

constexpr u32 kAttentionOffset = kSharedOffset + sizeof(WorkerShared);
static_assert(kAttentionOffset + sizeof(AttentionShared) <= sizeof(dynamic_shared), "the map ends here");

// What the last step's warpgroups had of the narrow pages of the first window: [num_workers, 2] of (kv head, page, number of pages).
std::vector<std::array<u32, 3>> narrow_ranges;

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

template <int kHeadDim>
void run_cta(const EngineParams& params, const u16* new_rows, u16* output) {
  const StepPlan* plan = reinterpret_cast<const StepPlan*>(params.plans[0]);
  const Op& op = *reinterpret_cast<const Op*>(params.ops);
  write_new_rows<kHeadDim>(params, op, plan, nullptr);
  std::memset(dynamic_shared, 0xff, sizeof(dynamic_shared));
  simt90::barriers.clear();
  simt90::copies.clear();
  simt90::wgmmas.assign(kWorkerThreads, std::vector<std::vector<simt90::Wgmma>>(1));
  u8* shared_memory = worker_memory();
  WorkerShared& shared = worker_shared(shared_memory);
  AttentionShared& attention = *reinterpret_cast<AttentionShared*>(shared_memory + kAttentionOffset);
  const u32 first_stage = simt::machine.random() % kWeightStages;
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
  // All other CTAs have arrived at the barrier before the op, and at none after it.
  *grid_word(params, kGridWordArrivals) = params.num_workers - 1;
  RingCursor produced{first_stage, 1};
  RingCursor consumed{};
  simt::machine.when_stuck = simt90::land_a_copy;
  simt::machine.run(kWorkerThreads, 0, [&] {
    if (thread_idx() < kComputeThreads) {
      prepare_attention<kHeadDim>(params, op, plan, 0, shared_memory, attention);
      if (is_first_thread()) {
        write_new_rows<kHeadDim>(params, op, plan, new_rows);
        red_add_release_gpu(grid_word(params, kGridWordArrivals), 1);
      }
      named_barrier_sync<1, kComputeThreads>();
      const RingCursor cursor = attend<kHeadDim>(params, shared_memory, shared, attention, RingCursor{first_stage, 0}, PlainStore{output, params.dims.num_heads * kHeadDim});
      if (is_first_thread()) consumed = cursor;
    } else if (thread_idx() == kComputeThreads) {
      // The narrow pages are not to wait for this barrier: they are produced before it, unless the ring is full.
      produce_attention<kHeadDim>(params, op, plan, 0, shared_memory, shared, attention, produced, 1);
    } else if (thread_idx() / 32 == 10) {
      find_windows(params, attention);
      plan_attention(params, plan, attention);
    }
  });
  for (u32 i = 0; i < 2; ++i) {
    const NarrowWalk& range = attention.windows[0].narrow[i];
    narrow_ranges.at(2 * cta_idx() + i) = {range.kv_head, range.page, range.num_pages};
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

}  // namespace

extern "C" int bk_attention_sm90_simt(const blinkimp::EngineParams* params, const unsigned short* new_rows, unsigned short* output, unsigned int seed) {
  simt::machine.random.seed(seed);
  narrow_ranges.assign(2 * params->num_workers, {});
  std::vector<u32> ctas(params->num_workers);
  for (u32 i = 0; i < ctas.size(); ++i) ctas[i] = i;
  std::shuffle(ctas.begin(), ctas.end(), simt::machine.random);
  for (const u32 cta : ctas) {
    simt90::cta_idx = cta;
    if (params->dims.head_dim == 64) run_cta<64>(*params, new_rows, output);
    else if (params->dims.head_dim == 128) run_cta<128>(*params, new_rows, output);
    else return -1;
  }
  return 0;
}

// Bytes of all bulk copies since the library was loaded.
extern "C" unsigned long long bk_copied_bytes() { return simt90::num_copied_bytes; }

// ranges: [num_workers, 2, 3], as narrow_ranges.
extern "C" void bk_narrow_ranges(unsigned int* ranges) { std::memcpy(ranges, narrow_ranges.data(), narrow_ranges.size() * sizeof(narrow_ranges[0])); }
