// A worker CTA's threads, shared memory map and rings; the waits of all roles. GPU only.
//
//   threads 0..255    two compute warpgroups
//   threads 256..383  producer warpgroup: warp 8 streams weights, warp 9 GEMM inputs, warps 10 and 11 sum up row scales (row_scales.cuh)
//
//   shared memory     [ scratch ]          in a GEMM: the input ring; in attention and sampling: their own use of the whole
//                     [ weight ring ]      filled ahead of time, across op boundaries and grid barriers: weights depend on nothing
//                     [ WorkerShared ]     mbarriers, row scales, where the program stands, ops
//                     [ AttentionShared ]  arguments and current item of attention
//   (The input ring stands first: wgmma reads 64 rows of an input tile of 8, 16 or 32, so past the tile's end, into whatever follows.)
//
// Used by device/gemm.cuh, device/worker.cuh. Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <activation_layout.cuh>
#include <fault.cuh>
#include <ptx_mma.cuh>

namespace blinkimp {

constexpr u32 kComputeThreads = 256;
constexpr u32 kWorkerThreads = 384;
constexpr u32 kWeightStages = 10;
constexpr u32 kWeightStageBytes = 16384;
constexpr u32 kInputStages = 4;
constexpr u32 kInputStageBytes = 16384;   // two tiles of 64 rows x 128 bytes
constexpr u32 kRowTileBytes = kRowTile * 128;
constexpr u32 kScratchBytes = 64 * 1024;
constexpr u32 kScratchOffset = 0;
constexpr u32 kRingOffset = kScratchBytes;
static_assert(kInputStages * kInputStageBytes <= kScratchBytes, "the input ring lies in the scratch");

// Where a role stands in a ring. Producers start with phase 1: the first wait on an empty stage passes.
struct RingCursor {
  u32 stage;
  u32 phase;
  BK_INLINE void advance(u32 num_stages) {
    if (++stage == num_stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  // Past `count` stages of a ring of num_stages.
  BK_INLINE void advance_by(u32 count, u32 num_stages) {
    stage += count;
    phase ^= stage / num_stages & 1u;
    stage %= num_stages;
  }
};

struct ConsumerCursors {
  RingCursor weights;
  RingCursor inputs;
};

// Where the compute threads are in the program. In shared memory, because attention needs their registers.
// Writer: thread 0 between two barriers, so that nobody reads it meanwhile; readers: all compute threads.
struct ComputeState {
  ConsumerCursors cursors;
  RingCursor scales;
  u32 num_barriers;  // grid barriers arrived at since launch
  u32 step;
  u32 op_idx;
  u32 num_rows;         // of the step
  u32 num_sample_rows;  // of the step
  u32 op_buffer;        // of WorkerShared.ops
  u32 leaves;           // the plan says exit
};

// What the producers look up of a step's plan.
struct StepRows {
  u32 num_rows;
  u32 num_sample_rows;
};

// Where a producer is in the program. In shared memory, because what lives through all ops would take registers that some op lacks.
struct ProducerState {
  u32 step;
  u32 op_idx;
  u32 num_barriers;  // grid barriers of the ops before
  u32 op_buffer;     // of WorkerShared.producer_ops: the next op's
  StepRows rows;     // of the step
  u32 tokens;        // the weight producer's alone: of a wide GEMM's items, rows
  u32 stack;         // and packed tiles
};
constexpr u32 kWeightProducer = 0;
constexpr u32 kInputProducer = 1;

constexpr u32 kScaleBuffers = 2;
constexpr u32 kScaleWarps = 2;

// Where a scale warp is, likewise: eight rows' loads take its registers.
struct ScaleState {
  ProducerState program;
  u32 item;      // of a GEMM op
  u32 tokens;    // rows of an item
  u32 stack;     // packed tiles of an item
  u32 row_tile;  // whose scales the last buffer has, of `tokens` rows
};

struct WorkerShared {
  // mbarriers of the rings: the producer's bulk copies complete `full`, the compute warpgroups arrive at `empty`. In this order: full_barrier()
  u64 inputs_full[kInputStages];     // [stage]
  u64 weights_full[kWeightStages];   // [stage]
  u64 inputs_empty[kInputStages];    // [stage]
  u64 weights_empty[kWeightStages];  // [stage]
  u64 scales_full[kScaleBuffers];    // [buffer]; the scale warps arrive
  u64 scales_empty[kScaleBuffers];   // [buffer]; the compute warpgroups arrive
  u64 producers_done;  // a phase per step: the producer warps have read its plan for the last time. Plan n + 1 is published after step n only
  const EngineParams* params;  // for what is out of line: arguments cost instructions at each call
  alignas(16) Op ops[2];                         // [op_idx % 2]: the op that runs and the next one
  Op producer_ops[2][2];                         // [kWeightProducer or kInputProducer][buffer]: the producer's op and the one behind it (enter_op)
  // [buffer][row]: 1 / rms of the rows of a pair of row tiles. A narrow step has one row tile: the second 64 floats are half_sums()
  f32 row_scale[kScaleBuffers][2 * kRowTile];
  ProducerState producers[2];  // [kWeightProducer or kInputProducer]; writer and reader: that thread
  ScaleState scale_states[kScaleWarps];  // [scale warp]; writer: its first lane, between two __syncwarp(); readers: its lanes
  ComputeState compute;
  ConsumerCursors next_cursors;  // what `compute` takes over when the op ends
  RingCursor next_scales;
  u32 is_idle;  // the GEMM op that runs has no item for this CTA; writer and reader: thread 0
  u32 num_paces;  // of gemm_pace.cuh, since launch; writer and reader: the weight producer
  u32 scales_are_late;  // a wait for row scales outlived the spin budget; writers and readers: compute threads
};

constexpr u32 kAttentionBlockBytes = 512;  // AttentionShared of attention_schedule.cuh, which asserts that it fits
constexpr u32 kSharedOffset = kRingOffset + kWeightStages * kWeightStageBytes;
constexpr u32 kAttentionBlockOffset = kSharedOffset + sizeof(WorkerShared);
constexpr u32 kSharedMemoryBytes = 232208;  // SHARED_MEMORY_BYTES of host/gpu_kernel.py
static_assert(kSharedMemoryBytes == kAttentionBlockOffset + kAttentionBlockBytes, "the map ends here");
static_assert(kSharedMemoryBytes <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");

// The map's first byte: a constant of the program, so it costs no register. Aligned, because the swizzle counts from 1024-byte lines.
BK_INLINE u8* worker_memory() {
  extern __shared__ __align__(1024) u8 dynamic_shared[];
  return dynamic_shared;
}
// [row] of one warpgroup, in a narrow step: where sums over half a head or half a group of columns meet (gemm_epilogues.cuh).
BK_INLINE f32* half_sums(WorkerShared& shared, u32 warpgroup) { return shared.row_scale[warpgroup] + kRowTile; }

// Barriers of a stage of either ring, by numbers of input stages, then of weight stages (gemm_pairs.cuh).
BK_INLINE u64* full_barrier(WorkerShared& shared, u32 place) { return &shared.inputs_full[0] + place; }
BK_INLINE u64* empty_barrier(WorkerShared& shared, u32 place) { return &shared.inputs_empty[0] + place; }

BK_INLINE WorkerShared& worker_shared(u8* shared_memory) { return *reinterpret_cast<WorkerShared*>(shared_memory + kSharedOffset); }

// The op that a producer is in: enter_op() of producer_program.cuh. Looked up where it is used: its address would take registers.
BK_INLINE const Op& entered_op(const WorkerShared& shared, u32 producer) { return shared.producer_ops[producer][shared.producers[producer].op_buffer ^ 1]; }

// Records a fault and stops the kernel. The record lies in pinned host memory, so losing the context to the trap does not lose it.
BK_INLINE void fail_here(const EngineParams& params, u32 code, u32 site, u64 expected, u64 seen) {
  // Another wait was first: its record must be whole before this trap stops the context, and takes microseconds to be.
  if (!record_fault(params, code, site, expected, seen)) sleep_ns(1000000);
  fence_acq_rel_sys();  // the record has left the SM before the trap
  trap();
}

// Out of line: inlined into every wait, its addresses would take registers from the loops around.
__device__ __noinline__ void fail(const EngineParams& params, u32 code, u32 site, u64 expected, u64 seen) { fail_here(params, code, site, expected, seen); }

// In a wait of one thread. kElected: of a producer's elected thread. Nothing in its loops may be a call, else addresses of copies do not stay in uniform registers, and what it
// executes for a copy takes twice as long (PERFORMANCE.md, eighteenth state). Inlined into other threads' waits, the record has that very effect.
template <bool kElected>
BK_INLINE void fail_wait(const EngineParams& params, u32 site, u64 expected, u64 seen) {
  if constexpr (kElected) fail_here(params, kFaultSpinExpired, site, expected, seen);
  else fail(params, kFaultSpinExpired, site, expected, seen);
}

constexpr u32 kTriesPerLook = 64;  // reading the clock takes longer than a try

// All lanes of a warp together; a wait that outlives the spin budget is a fault.
BK_INLINE void poll_mbarrier_warp(const EngineParams& params, u64* barrier, u32 parity, u32 site) {
  const u64 start_ns = device_clock_ns();
  while (!__all_sync(0xffffffffu, mbarrier_try_wait(barrier, parity))) {
    if (__any_sync(0xffffffffu, device_clock_ns() - start_ns > params.spin_budget_ns)) fail(params, kFaultSpinExpired, site, parity, *barrier);
  }
}

// Out of line: what hardly ever happens, written out at each wait, would be most of a step's code, and that must fit into the instruction caches
// (PERFORMANCE.md).
// offset: of the barrier in the shared memory map.
__device__ __noinline__ void wait_mbarrier_long(u32 offset, u32 parity, u32 site) {
  poll_mbarrier_warp(*worker_shared(worker_memory()).params, reinterpret_cast<u64*>(worker_memory() + offset), parity, site);
}

// Waits of all lanes of a compute warp together: the vote keeps the warp provably in step, which uniform registers need (gemm.cuh).
BK_INLINE void wait_mbarrier_warp(u64* barrier, u32 parity, u32 site) {
  if (!__all_sync(0xffffffffu, mbarrier_try_wait(barrier, parity))) wait_mbarrier_long(shared_address(barrier) - shared_address(worker_memory()), parity, site);  // it mostly waits in the first try
}

// Waits of one thread for a phase of an mbarrier; a wait that outlives the spin budget is a fault.
template <bool kElected = false>
BK_INLINE void wait_mbarrier(const EngineParams& params, u64* barrier, u32 parity, u32 site) {
  u64 start_ns = 0;
  for (u32 tries = 1; !mbarrier_try_wait(barrier, parity); tries++) {
    if (tries % kTriesPerLook) continue;
    const u64 now_ns = device_clock_ns();
    if (!start_ns) start_ns = now_ns;
    if (now_ns - start_ns > params.spin_budget_ns) fail_wait<kElected>(params, site, parity, *barrier);
  }
}

// The weight producer, before it fills the stage at the cursor: until the fill num_stages before that one has landed, so that no more are on their way.
BK_INLINE void wait_landed(const EngineParams& params, WorkerShared& shared, const RingCursor& cursor, u32 num_stages) {
  const bool same_lap = cursor.stage >= num_stages;
  const u32 stage = same_lap ? cursor.stage - num_stages : cursor.stage + kWeightStages - num_stages;
  wait_mbarrier<true>(params, &shared.weights_full[stage], same_lap ? cursor.phase ^ 1 : cursor.phase, kSiteWeightRing);
}

BK_INLINE u32* grid_word(const EngineParams& params, u32 word_idx) { return reinterpret_cast<u32*>(params.grid_words) + word_idx; }

BK_INLINE bool grid_has_passed(const EngineParams& params, u32 arrivals, u32 num_barriers) {
  return static_cast<i32>(arrivals - num_barriers * params.num_workers) >= 0;  // both count modulo 2^32, at most one step apart
}

// Waits until the grid has passed num_barriers barriers since launch. Acquire: pairs with grid_arrive().
template <bool kElected = false>
BK_INLINE void wait_grid(const EngineParams& params, u32 num_barriers) {
  u32* arrivals = grid_word(params, kGridWordArrivals);
  u64 start_ns = 0;
  u32 seen;
  for (u32 tries = 1; !grid_has_passed(params, seen = ld_acquire_gpu(arrivals), num_barriers); tries++) {
    if (tries % kTriesPerLook) continue;
    const u64 now_ns = device_clock_ns();
    if (!start_ns) start_ns = now_ns;
    if (now_ns - start_ns > params.spin_budget_ns) fail_wait<kElected>(params, kSiteGridBarrier, num_barriers * params.num_workers, seen);
  }
}

}  // namespace blinkimp
