// Matrix products of a step by mma.sync and cp.async: out[row, n] = sum over k of input[row, k] * weight[n, k]. Any GPU from sm_80 on.
//
// A CTA owns an output item (ROWS tokens x TILES weight tiles) over the whole K: no partial sums leave the SM. Each output is one chain of
// mma.sync m16n8k16 over k in rising order, whatever ROWS and TILES are, so its bits do not depend on the number of rows in the step.
// Weights: [tile][k / 64][TILE_ROWS rows][64 k] bf16, 16-byte chunks exchanged by row mod 8; packed by host/gpu_weights.py. They are copied as they
// lie. Inputs: plain rows of in_features bf16, swizzled on the way to shared memory. Both come through one ring of stages.
// The accumulators go to a tile of f32 in shared memory; the op's epilogue (epilogues.cuh) reads it row by row.
// Called by device/portable/worker.cuh. Test: pytest tests/host/test_portable_gemm_simt.py; on a GPU: pytest -m gpu tests/gpu/test_portable_gpu.py
#pragma once
#include <ptx_mma.cuh>

namespace blinkimp {

constexpr u32 kComputeThreads = 256;
constexpr u32 kComputeWarps = kComputeThreads / 32;
constexpr u32 kSliceColumns = 64;  // k per slice: 128 bytes, eight 16-byte chunks
constexpr u32 kSliceRowBytes = 128;
constexpr u32 kMaxItemRows = 128;

struct GemmArgs {
  const u8* weights;       // packed tiles
  const u16* input;        // bf16 [rows, num_slices * 64]
  const u32* input_rows;   // [num_rows]: the input row of each row of the product, or null: the same
  u32 num_rows;
  u32 num_slices;
  u32 num_tiles;
};

BK_INLINE constexpr u32 slices_in(u32 num_bytes, u32 slice_bytes) {
  return num_bytes >= 4 * slice_bytes ? 4 : (num_bytes >= 2 * slice_bytes ? 2 : 1);
}
BK_INLINE constexpr u32 stages_in(u32 num_bytes, u32 stage_bytes) {
  constexpr u32 kMaxStages = 12;
  return num_bytes / stage_bytes < kMaxStages ? num_bytes / stage_bytes : kMaxStages;
}

// The shape of one item and its place in shared memory: [ ring ][ output tile ], or one above the other where both do not fit.
template <u32 TILE_ROWS, u32 ROWS, u32 TILES, u32 SCRATCH_BYTES>
struct GemmConfig {
  static constexpr u32 kColumns = TILE_ROWS * TILES;
  static constexpr u32 kWarpsAlongRows = ROWS == 16 ? 1 : 4;
  static constexpr u32 kWarpsAlongColumns = kComputeWarps / kWarpsAlongRows;
  static constexpr u32 kRowFragments = ROWS / 16 / kWarpsAlongRows;  // of 16 rows, a warp
  static constexpr u32 kColumnBlocks = kColumns / 8;
  static constexpr u32 kWarpBlocks = (kColumnBlocks + kWarpsAlongColumns - 1) / kWarpsAlongColumns;
  static constexpr bool kHasIdleBlocks = kColumnBlocks % kWarpsAlongColumns != 0;
  static constexpr u32 kWeightBytes = kColumns * kSliceRowBytes;  // of a slice
  static constexpr u32 kInputBytes = ROWS * kSliceRowBytes;
  // A few slices a stage where they are small: fewer barriers, and several loads of a thread in flight.
  static constexpr u32 kStageSlices = slices_in(SCRATCH_BYTES / 6, kWeightBytes + kInputBytes);
  static constexpr u32 kStageBytes = kStageSlices * (kWeightBytes + kInputBytes);
  static constexpr u32 kOutputStride = kColumns + 8;  // floats; 8 more: rows g .. g + 3 of a half-warp's 8-byte stores lie in different banks
  static constexpr u32 kOutputBytes = ROWS * kOutputStride * 4;
  // Apart, the next item's loads run during the epilogue; that is worth less than a ring that hides a load's latency.
  static constexpr u32 kRingBesideOutput = SCRATCH_BYTES > kOutputBytes ? SCRATCH_BYTES - kOutputBytes : 0;
  static constexpr bool kOutputApart = stages_in(kRingBesideOutput, kStageBytes) >= 4;
  static constexpr u32 kStages = kOutputApart ? stages_in(kRingBesideOutput, kStageBytes) : stages_in(SCRATCH_BYTES, kStageBytes);
  static constexpr u32 kOutputOffset = kOutputApart ? kStages * kStageBytes : 0;

  static_assert(kColumns % 16 == 0 && ROWS % (16 * kWarpsAlongRows) == 0 && ROWS <= kMaxItemRows, "whole fragments for every warp");
  static_assert(kStages >= 3, "one stage is read, one is full, one is filled");
  static_assert(kOutputOffset + kOutputBytes <= SCRATCH_BYTES, "the output tile fits");
};

// The items of this CTA: tile groups x row groups, the row groups of one tile group next to each other, so that its weights are in L2 for all.
template <class Config, u32 TILES, u32 ROWS>
struct GemmItems {
  u32 num_row_groups;
  u32 num_items;
  BK_INLINE explicit GemmItems(const GemmArgs& args)
      : num_row_groups((args.num_rows + ROWS - 1) / ROWS), num_items((args.num_tiles + TILES - 1) / TILES * num_row_groups) {}
  BK_INLINE u32 row_begin(u32 item) const { return item % num_row_groups * ROWS; }
  BK_INLINE u32 tile_begin(u32 item) const { return item / num_row_groups * TILES; }
};

// The loads of a CTA's items, stage after stage, over item boundaries.
template <u32 TILE_ROWS, u32 ROWS, u32 TILES, u32 SCRATCH_BYTES>
struct GemmStream {
  using Config = GemmConfig<TILE_ROWS, ROWS, TILES, SCRATCH_BYTES>;
  u32 item;
  u32 slice;

  // Starts the copies of the next stage, if there is one, and commits them as one group. All threads call it together.
  BK_INLINE void issue(const GemmArgs& args, const GemmItems<Config, TILES, ROWS>& items, u32 num_ctas, u32 shared_stage) {
    if (item < items.num_items) {
      const u32 num_slices = min(Config::kStageSlices, args.num_slices - slice);
      issue_weights(args, items.tile_begin(item), num_slices, shared_stage);
      issue_inputs(args, items.row_begin(item), num_slices, shared_stage + Config::kStageSlices * Config::kWeightBytes);
      slice += num_slices;
      if (slice == args.num_slices) {
        slice = 0;
        item += num_ctas;
      }
    }
    cp_async_commit();
  }

 private:
  // A stage's weights: [slice][tile][TILE_ROWS][64]. Tiles past the last one become zeros.
  BK_INLINE void issue_weights(const GemmArgs& args, u32 tile_begin, u32 num_slices, u32 shared_stage) const {
    constexpr u32 kTileChunks = TILE_ROWS * 8;
    constexpr u32 kChunks = Config::kStageSlices * TILES * kTileChunks;
    const u32 thread = opaque(threadIdx.x);
#pragma unroll
    for (u32 i = 0; i < (kChunks + kComputeThreads - 1) / kComputeThreads; ++i) {
      const u32 chunk = i * kComputeThreads + thread;
      const u32 in_slice = chunk / (TILES * kTileChunks);
      const u32 tile = tile_begin + chunk / kTileChunks % TILES;
      if ((kChunks % kComputeThreads == 0 || chunk < kChunks) && in_slice < num_slices) {
        const bool valid = tile < args.num_tiles;
        const u64 block = static_cast<u64>(valid ? tile : 0) * args.num_slices + slice + in_slice;
        cp_async_16(shared_stage + chunk * 16, args.weights + (block * kTileChunks + chunk % kTileChunks) * 16, valid);
      }
    }
  }

  // A stage's inputs: [slice][ROWS][64], chunk c of a row at c ^ (row mod 8). Rows past the last one become zeros.
  BK_INLINE void issue_inputs(const GemmArgs& args, u32 row_begin, u32 num_slices, u32 shared_stage) const {
    constexpr u32 kRowChunks = Config::kStageSlices * 8;
    constexpr u32 kChunks = ROWS * kRowChunks;
    const u32 thread = opaque(threadIdx.x);
#pragma unroll
    for (u32 i = 0; i < (kChunks + kComputeThreads - 1) / kComputeThreads; ++i) {
      const u32 idx = i * kComputeThreads + thread;
      const u32 row = idx / kRowChunks;
      const u32 in_slice = idx / 8 % Config::kStageSlices;
      if ((kChunks % kComputeThreads == 0 || idx < kChunks) && in_slice < num_slices) {
        const bool valid = row_begin + row < args.num_rows;
        u32 source_row = valid ? row_begin + row : 0;
        if (args.input_rows != nullptr) source_row = args.input_rows[source_row];
        const u16* source = args.input + static_cast<u64>(source_row) * args.num_slices * kSliceColumns + (slice + in_slice) * kSliceColumns + idx % 8 * 8;
        cp_async_16(shared_stage + in_slice * Config::kInputBytes + row * kSliceRowBytes + (idx % 8 ^ row % 8) * 16, source, valid);
      }
    }
  }
};

// accumulators += one slice: this warp's kRowFragments x 16 rows times its blocks of 8 weight rows.
template <class Config>
BK_INLINE void multiply_slice(u32 shared_weights, u32 shared_inputs, f32 (&accumulators)[Config::kRowFragments][Config::kWarpBlocks][4]) {
  const u32 thread = opaque(threadIdx.x);
  const u32 lane = thread % 32u;
  const u32 warp = thread / 32u;
  const u32 warp_row = warp / Config::kWarpsAlongColumns * (Config::kRowFragments * 16);
  const u32 warp_block = warp % Config::kWarpsAlongColumns;
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {  // 32 k
    u32 rows[Config::kRowFragments][2][4];
#pragma unroll
    for (u32 m = 0; m < Config::kRowFragments; ++m) {
#pragma unroll
      for (u32 step = 0; step < 2; ++step) {
        const u32 chunk = half * 4 + step * 2 + lane / 16u;
        ldmatrix_x4(shared_inputs + (warp_row + m * 16 + lane % 16u) * kSliceRowBytes + (chunk ^ lane % 8u) * 16, rows[m][step]);
      }
    }
#pragma unroll
    for (u32 i = 0; i < Config::kWarpBlocks; ++i) {
      const u32 block = i * Config::kWarpsAlongColumns + warp_block;
      if (Config::kHasIdleBlocks && block >= Config::kColumnBlocks) continue;
      u32 columns[4];  // 8 weight rows x 32 k
      ldmatrix_x4(shared_weights + (block * 8 + lane % 8u) * kSliceRowBytes + ((half * 4 + lane / 8u) ^ lane % 8u) * 16, columns);
#pragma unroll
      for (u32 m = 0; m < Config::kRowFragments; ++m) {
        mma_bf16_16x8x16(accumulators[m][i], rows[m][0], columns[0], columns[1]);
        mma_bf16_16x8x16(accumulators[m][i], rows[m][1], columns[2], columns[3]);
      }
    }
  }
}

// Fragments to the output tile: f32 [ROWS][kOutputStride].
template <class Config>
BK_INLINE void store_accumulators(const f32 (&accumulators)[Config::kRowFragments][Config::kWarpBlocks][4], f32* output) {
  const u32 thread = opaque(threadIdx.x);
  const u32 lane = thread % 32u;
  const u32 warp = thread / 32u;
  const u32 warp_row = warp / Config::kWarpsAlongColumns * (Config::kRowFragments * 16);
  const u32 warp_block = warp % Config::kWarpsAlongColumns;
#pragma unroll
  for (u32 m = 0; m < Config::kRowFragments; ++m) {
#pragma unroll
    for (u32 i = 0; i < Config::kWarpBlocks; ++i) {
      const u32 block = i * Config::kWarpsAlongColumns + warp_block;
      if (Config::kHasIdleBlocks && block >= Config::kColumnBlocks) continue;
      f32* place = output + (warp_row + m * 16 + lane / 4u) * Config::kOutputStride + block * 8 + lane % 4u * 2u;
      *reinterpret_cast<float2*>(place) = make_float2(accumulators[m][i][0], accumulators[m][i][1]);
      *reinterpret_cast<float2*>(place + 8 * Config::kOutputStride) = make_float2(accumulators[m][i][2], accumulators[m][i][3]);
    }
  }
}

// What an epilogue is handed: an item's products, in shared memory.
struct OutputTile {
  const f32* values;   // [num_rows][stride], the tiles' rows side by side
  u32 stride;
  u32 row_begin;       // of the step (LM head: of the sampled rows)
  u32 num_rows;
  u32 tile_begin;
  u32 num_tiles;       // that exist
};

// All items of an op for this CTA; all 256 threads call it. prepare(row_begin, num_rows) runs before the epilogue of a row group that differs from
// the item's before, epilogue(const OutputTile&) after each item; barriers stand around both.
template <u32 TILE_ROWS, u32 ROWS, u32 TILES, u32 SCRATCH_BYTES, class Prepare, class Epilogue>
BK_INLINE void run_gemm_items(const GemmArgs& args, u32 cta, u32 num_ctas, u8* scratch, const Prepare& prepare, const Epilogue& epilogue) {
  using Config = GemmConfig<TILE_ROWS, ROWS, TILES, SCRATCH_BYTES>;
  constexpr u32 kStages = Config::kStages;
  const GemmItems<Config, TILES, ROWS> items(args);
  const u32 ring = shared_address(scratch);
  f32* output = reinterpret_cast<f32*>(scratch + Config::kOutputOffset);
  GemmStream<TILE_ROWS, ROWS, TILES, SCRATCH_BYTES> stream{cta, 0};
  u32 stage = 0;
  u32 prepared_row_begin = kNoRow;
  bool is_primed = false;
  for (u32 item = cta; item < items.num_items; item += num_ctas) {
    if (!is_primed) {
      stream.item = item;
      stage = 0;
#pragma unroll 1
      for (u32 i = 0; i < kStages - 1; ++i) {
        // Where the ring ends with the item, the next item's stages are not loaded over its output tile.
        if (Config::kOutputApart || stream.item == item) stream.issue(args, items, num_ctas, ring + i * Config::kStageBytes);
        else cp_async_commit();
      }
      is_primed = Config::kOutputApart;
    }
    const u32 row_begin = items.row_begin(item);
    const u32 num_rows = min(ROWS, args.num_rows - row_begin);
    if (row_begin != prepared_row_begin) prepare(row_begin, num_rows);
    prepared_row_begin = row_begin;
    f32 accumulators[Config::kRowFragments][Config::kWarpBlocks][4];
#pragma unroll
    for (u32 m = 0; m < Config::kRowFragments; ++m) {
#pragma unroll
      for (u32 i = 0; i < Config::kWarpBlocks; ++i) accumulators[m][i][0] = accumulators[m][i][1] = accumulators[m][i][2] = accumulators[m][i][3] = 0.0f;
    }
#pragma unroll 1
    for (u32 slice = 0; slice < args.num_slices; slice += Config::kStageSlices) {
      cp_async_wait<static_cast<int>(kStages - 2)>();
      named_barrier_sync<1, kComputeThreads>();  // hazards: stages of other threads' copies; refill under a slow reader; the output tile of the item before
      const u32 refilled = ring + (stage == 0 ? kStages - 1 : stage - 1) * Config::kStageBytes;
      if (Config::kOutputApart || stream.item == item) stream.issue(args, items, num_ctas, refilled);
      else cp_async_commit();
      const u32 weights = ring + stage * Config::kStageBytes;
      const u32 inputs = weights + Config::kStageSlices * Config::kWeightBytes;
#pragma unroll
      for (u32 i = 0; i < Config::kStageSlices; ++i) {
        if (i == 0 || slice + i < args.num_slices) {
          multiply_slice<Config>(weights + i * Config::kWeightBytes, inputs + i * Config::kInputBytes, accumulators);
        }
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    if (!Config::kOutputApart) named_barrier_sync<1, kComputeThreads>();  // hazard: a slow warp still reads the ring under the output tile
    store_accumulators<Config>(accumulators, output);
    named_barrier_sync<1, kComputeThreads>();  // the tile is complete, and so is what prepare() left
    const u32 tile_begin = items.tile_begin(item);
    epilogue(OutputTile{output, Config::kOutputStride, row_begin, num_rows, tile_begin, min(TILES, args.num_tiles - tile_begin)});
    // Hazard: the next item's loads, or its prepare(), under a slow reader of this epilogue.
    if (!Config::kOutputApart || item + num_ctas < items.num_items) named_barrier_sync<1, kComputeThreads>();
  }
  cp_async_wait<0>();  // only empty groups are left; nothing lands in the scratch once others use it
}

}  // namespace blinkimp
