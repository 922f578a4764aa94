// How a GEMM op of more than 64 rows is cut into items: which output tile, in which order, on which CTA. GPU only.
//
// An item is an output tile of kTokens rows (tokens) x N weight rows, N being `stack` packed weight tiles side by side. All roles of all workers
// compute the same WideTiling from the op and the row count, and walk the same items; nothing of it depends on the host.
//
// The rule: of the tiles that the kernel is compiled for, the one whose busiest CTA is done first,
//   time = rounds * (num_slices * max(tokens * N / 47, 2 * (tokens + N), 100 * copies) + 4000) ns
// tokens * N / 47 is a 64-column slice at 790 TFLOP/s on 132 SMs, 2 ns a row its bytes at 62 GB/s an SM, 100 a
// bulk copy of 4 to 16 KB (8 + 2 copies a slice take 1.0 us on 16 CTAs as on 128), 4000 the epilogue. Rounds are whole: 128 items on 131 CTAs are
// one round, 132 are two. Of equals the larger tile: fewer bytes. Examples (Llama-3-8B): device/GEMM_WIDE.md.
// Used by device/gemm_wide.cuh. Test: pytest -m gpu tests/gpu/test_gemm_wide.py
#pragma once
#include <gemm_shape.cuh>

namespace blinkimp {

constexpr u32 kMaxWideColumns = 256;      // weight rows of an item: wgmma's largest N
constexpr u32 kMinWideColumns = 64;       // smaller ones bring more input bytes than weights
constexpr u32 kRasterRowTiles = 16;       // row tiles swept side by side: their inputs and the weights of 8 items stay in L2
constexpr u32 kWideEpilogueNs = 4000;
constexpr u32 kBulkCopyNs = 100;

// For measurements and tests: 0 = the rule decides, else the tiling of every op.
#ifndef BK_WIDE_TOKENS
#define BK_WIDE_TOKENS 0
#define BK_WIDE_STACK 0
#endif

// More than one row tile: beyond what the narrow path of gemm.cuh takes.
BK_INLINE constexpr bool is_wide(u32 num_rows) { return num_rows > kRowTile; }

// Largest and smallest stack of packed tiles of this height that an item may have: powers of two.
BK_INLINE constexpr u32 max_stack(u32 tile_rows) {
  u32 stack = 1;
  while (2 * stack * tile_rows <= kMaxWideColumns) stack *= 2;
  return stack;
}

// 112 alone (gate-up, LM head) is left out: these ops have tiles for many rounds, and in rounds 224 costs less than twice 112.
BK_INLINE constexpr u32 min_stack(u32 tile_rows) {
  u32 stack = tile_rows == 112 ? 2 : 1;
  while (stack * tile_rows < kMinWideColumns) stack *= 2;
  return stack;
}

// Packed tiles of an item of 64 rows, which one warpgroup has all of: at most 128 weight rows of them.
constexpr u32 kLoneStack = 2;
constexpr u32 kMaxLoneColumns = 128;
BK_INLINE constexpr bool has_lone_items(u32 tile_rows) { return kLoneStack * tile_rows <= kMaxLoneColumns; }

// How a weight slice of `columns` rows lies in the ring.
BK_INLINE constexpr u32 unit_stages(u32 columns) { return columns * 128 > kWeightStageBytes ? 2 : 1; }
BK_INLINE constexpr u32 unit_slices(u32 columns) { return columns * 128 * 2 <= kWeightStageBytes ? 2 : 1; }
static_assert(kWeightStages % 2 == 0, "units of two stages never wrap in the middle");

struct WideTiling {
  u32 num_rows;
  u32 num_slices;
  u32 num_tiles;         // packed
  u32 tile_rows;
  u32 tokens;            // rows of an item: 64 or 128
  u32 stack;             // packed tiles of an item; the last item of a row may have fewer
  u32 num_row_tiles;     // of `tokens` rows
  u32 num_weight_items;  // of `stack` packed tiles
  u32 num_items;
};

BK_INLINE WideTiling wide_tiling_of(const Op& op, u32 num_rows, u32 tokens, u32 stack) {
  WideTiling tiling{num_rows, op.in_features / kSliceColumns, op.num_tiles, op.tile_rows, tokens, stack, (num_rows + tokens - 1) / tokens, (op.num_tiles + stack - 1) / stack, 0};
  tiling.num_items = tiling.num_row_tiles * tiling.num_weight_items;
  return tiling;
}

BK_INLINE u32 wide_time_ns(const EngineParams& params, const WideTiling& tiling) {
  const u32 columns = tiling.stack * tiling.tile_rows;
  const u32 num_copies = tiling.tokens == kRowTile ? 2 : tiling.stack + 2;
  const u32 slice_ns = max(max(tiling.tokens * columns / 47, 2 * (tiling.tokens + columns)), num_copies * kBulkCopyNs);
  return (tiling.num_items + params.num_workers - 1) / params.num_workers * (tiling.num_slices * slice_ns + kWideEpilogueNs);
}

// The tiling of an op. num_rows > 64.
BK_INLINE WideTiling wide_tiling(const EngineParams& params, const Op& op, u32 num_rows) {
  if constexpr (BK_WIDE_TOKENS != 0) return wide_tiling_of(op, num_rows, BK_WIDE_TOKENS, BK_WIDE_STACK);
  u32 tokens = 2 * kRowTile;
  u32 stack = max_stack(op.tile_rows);
  u32 best_ns = wide_time_ns(params, wide_tiling_of(op, num_rows, tokens, stack));
  const auto consider = [&](u32 other_tokens, u32 other) {
    const u32 other_ns = wide_time_ns(params, wide_tiling_of(op, num_rows, other_tokens, other));
    if (other_ns >= best_ns) return;
    tokens = other_tokens;
    stack = other;
    best_ns = other_ns;
  };
#pragma unroll 1
  for (u32 other = stack / 2; other >= min_stack(op.tile_rows); other /= 2) consider(2 * kRowTile, other);
  if (num_rows <= 2 * kRowTile && has_lone_items(op.tile_rows)) consider(kRowTile, kLoneStack);
  return wide_tiling_of(op, num_rows, tokens, stack);
}

// Where an item lies. Row tiles go fastest, within groups of kRasterRowTiles: the CTAs that run at the same time share weights and inputs.
struct GemmItem {
  u32 row_tile;     // of `tokens` rows
  u32 weight_item;  // of `stack` packed tiles
};

BK_INLINE GemmItem gemm_item(const WideTiling& tiling, u32 item) {
  const u32 first_row_tile = item / (kRasterRowTiles * tiling.num_weight_items) * kRasterRowTiles;
  const u32 group_row_tiles = min(tiling.num_row_tiles - first_row_tile, kRasterRowTiles);
  const u32 in_group = item - first_row_tile * tiling.num_weight_items;
  return GemmItem{first_row_tile + in_group % group_row_tiles, in_group / group_row_tiles};
}

BK_INLINE GemmWalk gemm_walk(const EngineParams& params, const WideTiling& tiling) { return GemmWalk{cta_idx(), params.num_workers, tiling.num_items}; }

}  // namespace blinkimp
