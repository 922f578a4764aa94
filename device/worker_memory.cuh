// A worker CTA's threads, shared memory map and rings; the activation layout that GEMMs read. GPU only.
//
//   threads 0..255    two compute warpgroups            threads 256..383  producer warpgroup: warp 8 streams weights, warp 9 inputs
//
//   shared memory     [ weight ring: 8 x 16 KB ]  filled ahead of time, across op boundaries and grid barriers: weights depend on nothing
//                     [ scratch: 96 KB ]          in a GEMM: input ring 4 x 16 KB, then the reduction buffer 32 KB
//                                                 in attention and sampling: their own use of the whole
//                     [ WorkerShared ]            mbarriers and row scales
//                     [ AttentionShared ]         arguments and current item of attention
//
// Used by device/gemm.cuh, device/worker.cuh. Test: pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <fault.cuh>
#include <ptx_sm90.cuh>

namespace blinkimp {

constexpr u32 kComputeThreads = 256;
constexpr u32 kWorkerThreads = 384;
constexpr u32 kSliceColumns = 64;         // k per slice: 128 bytes of bf16, the swizzle's width
constexpr u32 kRowTile = 64;              // wgmma's M
constexpr u32 kWeightStages = 8;
constexpr u32 kWeightStageBytes = 16384;
constexpr u32 kInputStages = 4;
constexpr u32 kInputStageBytes = 16384;   // two tiles of 64 rows x 128 bytes
constexpr u32 kRowTileBytes = kRowTile * 128;
constexpr u32 kReduceBytes = 32768;       // 64 fragment registers x 128 threads x 4 bytes
constexpr u32 kScratchBytes = kInputStages * kInputStageBytes + kReduceBytes;
constexpr u32 kRingOffset = 0;
constexpr u32 kScratchOffset = kWeightStages * kWeightStageBytes;

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
};

struct ConsumerCursors {
  RingCursor weights;
  RingCursor inputs;
};

// Where the compute threads are in the program. In shared memory, because attention needs their registers.
// Writer: thread 0 between two barriers, so that nobody reads it meanwhile; readers: all compute threads.
struct ComputeState {
  ConsumerCursors cursors;
  u32 num_barriers;  // grid barriers passed since launch
  u32 step;
  u32 op_idx;
  u32 reserved0;
};

struct WorkerShared {
  // mbarriers of the two rings: the producer's bulk copies complete `full`, the compute warpgroups arrive at `empty`
  u64 weights_full[kWeightStages];   // [stage]
  u64 weights_empty[kWeightStages];  // [stage]
  u64 inputs_full[kInputStages];     // [stage]
  u64 inputs_empty[kInputStages];    // [stage]
  u64 producers_done;  // a phase per step: both producers have read its plan for the last time. Plan n + 1 is published after step n only
  f32 row_scale[2 * kRowTile];  // 1 / rms of the rows of the current pair of row tiles
  ComputeState compute;
};

constexpr u32 kAttentionBlockBytes = 256;  // AttentionShared of attention_schedule.cuh; device/worker.cuh asserts that it fits
constexpr u32 kSharedOffset = kScratchOffset + kScratchBytes;
constexpr u32 kAttentionBlockOffset = kSharedOffset + sizeof(WorkerShared);
constexpr u32 kSharedMemoryBytes = 230376;  // SHARED_MEMORY_BYTES of host/gpu_kernel.py
static_assert(kSharedMemoryBytes == kAttentionBlockOffset + kAttentionBlockBytes, "the map ends here");
static_assert(kSharedMemoryBytes <= 227 * 1024, "a Hopper CTA has 227 KB of shared memory");

// The map's first byte: a constant of the program, so it costs no register. Aligned, because the swizzle counts from 1024-byte lines.
BK_INLINE u8* worker_memory() {
  extern __shared__ __align__(1024) u8 dynamic_shared[];
  return dynamic_shared;
}
BK_INLINE WorkerShared& worker_shared(u8* shared_memory) { return *reinterpret_cast<WorkerShared*>(shared_memory + kSharedOffset); }

// Workspaces of the GPU interpreter (EngineParams.workspaces); rows padded to 128. host/gpu_memory.py allocates by the same list.
enum Workspace : u32 {
  kWsHidden = 0,         // f32 [rows, hidden]
  kWsNormed = 1,         // bf16 tiled input, hidden columns: hidden * gain of the next norm
  kWsQuery = 2,          // bf16 [rows, num_heads * head_dim], pairs of the rotation adjacent
  kWsAttention = 3,      // bf16 tiled input, num_heads * head_dim columns
  kWsActivation = 4,     // bf16 tiled input, intermediate columns
  kWsSquares = 5,        // f32 [rows, hidden / 32]: sums of squares of 32 hidden columns
  kWsLogits = 6,         // f32 [max_batch, vocab]
  kWsSampledInput = 7,   // bf16 tiled input, hidden columns, sampled rows only
  kWsSampledScale = 8,   // f32 [max_batch]: 1 / rms of the sampled rows
  kWsAttentionPart = 9,  // attention's partial results
  kWsLogitBest = 10,     // u64 [max_batch, ceil(vocab / 112)]: the best logit of each tile (logits_epilogue.cuh)
};
constexpr u32 kSquaresColumns = 32;

// Element offset of (row, column) in a tiled input of num_slices slices: [row / 64][column / 64][64 rows][64 columns], the 16-byte chunks of
// a row exchanged by the 128-byte swizzle (chunk ^= row mod 8), so that a bulk copy brings what wgmma reads.
BK_INLINE u64 tiled_offset(u32 row, u32 column, u32 num_slices) {
  u32 within = (row % kRowTile) * kSliceColumns + ((((column % kSliceColumns) / 8) ^ (row % 8)) * 8) + column % 8;
  return (static_cast<u64>(row / kRowTile) * num_slices + column / kSliceColumns) * (kRowTile * kSliceColumns) + within;
}

// Records a fault and stops the kernel. The record lies in pinned host memory, so losing the context to the trap does not lose it.
// Out of line: inlined into every wait, its addresses would take registers from the loops around.
__device__ __noinline__ void fail(const EngineParams& params, u32 code, u32 site, u64 expected, u64 seen) {
  // Another wait was first: its record must be whole before this trap stops the context, and takes microseconds to be.
  if (!record_fault(params, code, site, expected, seen)) sleep_ns(1000000);
  fence_acq_rel_sys();  // the record has left the SM before the trap
  trap();
}

// Waits for a phase of an mbarrier; a wait that outlives the spin budget is a fault.
BK_INLINE void wait_mbarrier(const EngineParams& params, u64* barrier, u32 parity, u32 site) {
  if (mbarrier_try_wait(barrier, parity)) return;
  const u64 start_ns = device_clock_ns();
  while (!mbarrier_try_wait(barrier, parity)) {
    if (device_clock_ns() - start_ns > params.spin_budget_ns) {
      fail(params, kFaultSpinExpired, site, parity, *barrier);
    }
  }
}

// Words of EngineParams.grid_words, 128 bytes apart.
constexpr u32 kGridWordPlan = 0;      // steps published by the director (writer: director; readers: workers)
constexpr u32 kGridWordArrivals = 32; // arrivals at grid barriers, ever (writers: workers; readers: workers, director)
BK_INLINE u32* grid_word(const EngineParams& params, u32 word_idx) { return reinterpret_cast<u32*>(params.grid_words) + word_idx; }

BK_INLINE bool grid_has_passed(const EngineParams& params, u32 arrivals, u32 num_barriers) {
  return static_cast<i32>(arrivals - num_barriers * params.num_workers) >= 0;  // both count modulo 2^32, at most one step apart
}

// Waits until the grid has passed num_barriers barriers since launch. Acquire: pairs with grid_arrive().
BK_INLINE void wait_grid(const EngineParams& params, u32 num_barriers) {
  u32* arrivals = grid_word(params, kGridWordArrivals);
  if (grid_has_passed(params, ld_acquire_gpu(arrivals), num_barriers)) return;
  const u64 start_ns = device_clock_ns();
  u32 seen;
  while (!grid_has_passed(params, seen = ld_acquire_gpu(arrivals), num_barriers)) {
    if (device_clock_ns() - start_ns > params.spin_budget_ns) fail(params, kFaultSpinExpired, kSiteGridBarrier, num_barriers * params.num_workers, seen);
  }
}

}  // namespace blinkimp
