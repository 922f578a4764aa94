// Matrix products of a step of at most 16 rows: gemm.cuh's sums, bit for bit, with the operands of wgmma exchanged. GPU only.
//
// Weight rows are wgmma's M, tokens its N: 8 or 16 of them are multiplied, not 64. A window of 64 weight rows ends with the tile and begins before it, if the tile
// is shorter: what lies there in the ring gives rows that nobody reads. A tile of more than 64 rows has two windows, one for each warpgroup; where they overlap both
// store the same bits. Else warpgroup 0 has the tile, and gives stages back for both.
// A fragment spreads the weight rows over the warps, so each warp has a tail: 16 columns of all tokens, turned in registers to what the epilogues take.
// Called by device/worker.cuh. Test: pytest tests/host/test_worker_sm90_simt.py; pytest -m gpu tests/gpu/test_gemm.py
#pragma once
#include <gemm_epilogues.cuh>

namespace blinkimp {

constexpr u32 kMostSwappedRows = 16;  // of 32 as many products are left over as of 64
constexpr int kPieceColumns = 16;     // weight rows of a warp in a fragment
constexpr u32 kNoColumn = 0x7fffffe0;  // of a warp without one: past every matrix, and the first of a group of 32

// Whether a tile's rows are pieces, and its tail takes them.
template <int kTileRows, class Epilogue>
constexpr bool kIsSwappable = Epilogue::kTakesPieces && kTileRows % kPieceColumns == 0 && kTileRows <= 2 * static_cast<int>(kRowTile);

// A warp's fragment of 16 weight rows x kTokens, turned: `rows` is the fragment of 16 rows (tokens) x 16 columns that fragment.cuh describes. Lane (g, q) holds weight
// rows g, g + 8 of tokens 8i + 2q + {0, 1}; it takes columns 2q + {0, 1} (+ 8) of tokens g (+ 8).
template <int kTokens>
BK_INLINE void turn_fragment(const f32 (&d)[kTokens / 2], f32 (&rows)[kPieceColumns / 2]) {
  const u32 lane = thread_idx() % 32;
  const bool is_odd = lane / 4 % 2 != 0;
#pragma unroll
  for (u32 side = 0; side < 2; side++) {
    const u32 source = (lane % 4 * 2 + side) * 4 + lane / 8;
#pragma unroll
    for (u32 block = 0; block < 2; block++) {
#pragma unroll
      for (u32 half = 0; half < 2; half++) {
        f32& value = rows[block * 4 + half * 2 + side];
        value = 0.0f;
        if (half * 8 >= kTokens) continue;
        const f32 even = __shfl_sync(0xffffffffu, d[half * 4 + block * 2], source);
        const f32 odd = __shfl_sync(0xffffffffu, d[half * 4 + block * 2 + 1], source);
        value = is_odd ? odd : even;
      }
    }
  }
}

// One item. All compute threads; those of a warpgroup without a window count along in the rings.
template <int kTileRows, int kTokens, bool kScaled, class Epilogue>
BK_INLINE void run_swapped_item(const GemmShape& shape, u32 tile_idx, u8* shared_memory, WorkerShared& shared, ConsumerCursors& cursors,
                                ScaleReader& scales, const Epilogue& epilogue) {
  constexpr bool kTwoWindows = kTileRows > static_cast<int>(kRowTile);
  constexpr u32 kStageSlices = slices_per_stage(kTileRows);
  const u32 warpgroup = uniform(thread_idx() / 128);
  const bool has_window = kTwoWindows || warpgroup == 0;
  const i32 window = kTwoWindows && warpgroup == 0 ? 0 : kTileRows - static_cast<i32>(kRowTile);  // its first row in the tile
  const u32 piece = uniform(thread_idx() % 128 / 32 * kPieceColumns);
  const bool has_piece = has_window && window + static_cast<i32>(piece) >= 0;
  f32 d[kTokens / 2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; i++) d[i] = 0.0f;
  // Rows 0 .. 15 in each warp: a fragment's of warp w begin at row 16w.
  FragmentTail<kPieceColumns, false, Epilogue> tail(epilogue, 0u - piece, has_piece ? tile_idx * kTileRows + window + piece : kNoColumn);
  const u32 num_slices = uniform(shape.num_slices);
  if (has_window) {
    const u32 base = uniform(shared_address(shared_memory));
    MainLoop loop{shared, RingCursor{uniform(cursors.weights.stage), uniform(cursors.weights.phase)}, RingCursor{uniform(cursors.inputs.stage), uniform(cursors.inputs.phase)},
                  wgmma_descriptor(base + kScratchOffset), wgmma_descriptor(base + kRingOffset + static_cast<u32>(window * 128)), thread_idx() % 128 == 0 ? (kTwoWindows ? 1u : 2u) : 0u};
    multiply_narrow<kTileRows, kStageSlices>(loop, num_slices, kTokens, [&](u64 inputs, u64 tile) {
#pragma unroll
      for (int k = 0; k < 4; k++) wgmma_m64_k16<kTokens>(d, tile + 2 * k, inputs + 2 * k, 1);
    });
    settle(d);
    cursors = ConsumerCursors{loop.weights, loop.inputs};
  } else {
    pass_stages(shape, kStageSlices, cursors);
  }
  f32 rows[kPieceColumns / 2];
  turn_fragment<kTokens>(d, rows);
  const f32* row_scale = nullptr;
  if constexpr (kScaled) row_scale = scales.wait(shared);
  if (Epilogue::kMeets || has_piece) tail.finish(rows, row_scale);
}

// Runs all items of an op for this CTA: run_gemm() of a step of at most 16 rows.
template <int kTileRows, int kTokens, bool kScaled, class Epilogue>
BK_INLINE void run_gemm_swapped(const EngineParams& params, const GemmShape& shape, u8* shared_memory, WorkerShared& shared, const Epilogue& epilogue) {
  ConsumerCursors cursors = shared.compute.cursors;
  ScaleReader scales{kScaled ? shared.compute.scales : RingCursor{}, kNoRow};
  const GemmWalk walk = tile_walk(params, shape);
  const u32 end = uniform(walk.end);
  if (walk.first >= end) note_idle(shared);
  for (u32 item = uniform(walk.first); item < end; item += walk.stride) {
    if constexpr (kScaled) scales.enter(shared, 0);
    run_swapped_item<kTileRows, kTokens, kScaled>(shape, item, shared_memory, shared, cursors, scales, epilogue);
  }
  if constexpr (kScaled) scales.leave(shared);
  leave_rings(shared, cursors);
}

}  // namespace blinkimp
