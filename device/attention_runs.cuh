// What a warpgroup does next in attention: its range of narrow pages unit by unit, then its half of the CTA's wide items. GPU only.
//
// Called by device/attention.cuh. Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <attention_producer.cuh>

namespace blinkimp {

constexpr u32 kNoPatchPage = 0xffffffffu;

template <int kHeadDim>
constexpr u32 kQueryTileBytes = kTileRows * kHeadDim * 2;  // [head_dim / 64][64 rows][64], swizzled as K is

// Places in a query tile of 64 rows, bytes, by the slot of a narrow run: its query rows, and its row's new key and value until the last page is
// there. In rows that the other run does not use; wgmma reads 64 rows from the first on and nobody the products of the rest.
constexpr u32 kNarrowQueryBytes = kNarrowRows * kKvBlockDims * 2;
constexpr u32 kNewRowOffset = 2 * kNarrowQueryBytes;
constexpr u32 kNewRowBytes = 512;
static_assert(kNewRowOffset + 2 * kNewRowBytes <= kKvBlockBytes, "within the tile's first block");

template <int kHeadDim>
constexpr u32 kAttentionScratchBytes = 2 * kQueryTileBytes<kHeadDim> + sizeof(AttentionState);  // [warpgroup] query tiles, then the state

template <int kHeadDim>
BK_INLINE AttentionState& attention_state(u8* shared_memory) {
  return *reinterpret_cast<AttentionState*>(shared_memory + kScratchOffset + 2 * kQueryTileBytes<kHeadDim>);
}

// The pages that hold a key which some row between the two positions must not see: page >= mask_from or < mask_until.
BK_INLINE void set_mask_pages(AttentionRun& run, u32 first_position, u32 last_position, u32 window) {
  run.mask_from = (first_position + 1) / kPageTokens;
  run.mask_until = (first_visible_key(last_position, window) + kPageTokens - 1) / kPageTokens;
}

// Finds the pages that need nothing special; the rest of the run is written.
BK_INLINE void set_plain_pages(AttentionRun& run) {
  const bool is_wide = run.kind == kRunWide;
  u32 begin = max(run.page_begin, run.mask_until ? run.mask_until - 1 : 0);
  u32 end = min(run.page_end, run.mask_from);  // of the pages after
  if (run.patch_page != kNoPatchPage) end = min(end, run.patch_page);
  end = end ? end - 1 : 0;
  if (is_wide) {
    begin = max(begin, run.order_begin);
    end = min(end, run.order_end);
  }
  run.plain_begin = begin;
  run.num_plain = end > begin ? end - begin : 0;
}

// The next run of a warpgroup, by one thread. Out of line: loops of one thread, inlined, make the compiler take the warp for divergent from
// there on, and wgmma's descriptors then leave the uniform registers.
template <int kHeadDim>
__device__ __noinline__ void next_run(const EngineParams& params, const AttentionShared& attention, AttentionState& state, u32 slot, u32 warpgroup) {
  const Op& op = *state.op;
  const PlanSeq* seqs = plan_seqs(params, state.plan);
  const u32 num_kv_heads = params.dims.num_kv_heads;
  AttentionRun& run = state.runs[warpgroup][slot];
  run.group = attention.group;
  run.group_reciprocal = attention.group_reciprocal;
  run.window = op.window;
  if (normalise(params, seqs, attention, op.window, state.walks[warpgroup])) {
    NarrowWalk& walk = state.walks[opaque(warpgroup)];  // read anew: kept from before, its words would be more than there are registers
    const u32 unit_begin = first_page(walk.position, op.window);
    const u32 unit_end = walk.position / kPageTokens + 1;
    const u32 num_pages = run_pages(walk);
    run.kind = kRunNarrow;
    run.kv_head = walk.kv_head;
    run.row_begin = walk.row;
    run.position_begin = walk.position;
    run.packed_begin = 0;
    run.num_packed = attention.group;
    run.query_offset = warpgroup * kQueryTileBytes<kHeadDim> + slot * kNarrowQueryBytes;
    run.new_row_offset = warpgroup * kQueryTileBytes<kHeadDim> + kNewRowOffset + slot * kNewRowBytes;
    run.page_begin = walk.page;
    run.page_end = walk.page + num_pages;
    run.joins = run.skip_before = run.skip_after = run.order_begin = run.order_end = 0;
    set_mask_pages(run, walk.position, walk.position, op.window);
    run.key_end = walk.position + 1;
    run.patch_page = kNoPatchPage;
    if (run.page_end == unit_end) {
      run.patch_page = unit_end - 1;
      run.patch_source = reinterpret_cast<u64>(kv_tile<kHeadDim>(params, op.layer, walk.last_page_id, walk.kv_head));
    }
    set_plain_pages(run);
    run.first_split = walk.page / kSplitPages - unit_begin / kSplitPages;
    run.unit_idx = walk.seq_idx * num_kv_heads + walk.kv_head;
    run.item_begin = walk.item_idx - run.first_split;
    run.num_splits = splits_between(unit_begin, unit_end);
    walk.item_idx += splits_between(run.page_begin, run.page_end);
    walk.page += num_pages;
    walk.num_pages -= num_pages;
    return;
  }
  if (!next_wide_item(params, seqs, attention, state.wide_walks[warpgroup], &state.wide_items[warpgroup])) {
    run.kind = kRunEnd;
    return;
  }
  const WideItem& item = state.wide_items[opaque(warpgroup)];  // read anew, too
  const PlanSeq& seq = seqs[item.seq_idx];
  run.kind = kRunWide;
  run.joins = state.wide_walks[warpgroup].round == 1;
  run.query_offset = warpgroup * kQueryTileBytes<kHeadDim>;
  run.kv_head = item.kv_head;
  run.row_begin = seq.row_begin;
  run.position_begin = seq.position_begin;
  run.key_end = seq.position_begin + seq.num_rows;
  run.skip_before = run.skip_after = run.order_begin = 0;
  run.order_end = kNoPatchPage;
  const u32 reciprocal = attention.group_reciprocal;
  const u32 item_begin = wide_page_begin(item, run.position_begin, reciprocal, op.window);
  const u32 item_end = wide_page_end(item, run.position_begin, reciprocal);
#pragma unroll 1
  for (u32 i = 0; i < 2; ++i) {  // both warpgroups' pages: turns are taken where they overlap
    const u32 packed_begin = item.tile_begin + i * kTileRows;
    const u32 num_packed = packed_begin < item.tile_end ? min(kTileRows, item.tile_end - packed_begin) : 0;
    const u32 first_position = run.position_begin + divide_by_group(packed_begin, reciprocal);
    const u32 last_position = num_packed ? run.position_begin + divide_by_group(packed_begin + num_packed - 1, reciprocal) : first_position;
    const u32 page_begin = num_packed ? first_page(first_position, op.window) : item_begin;
    const u32 page_end = num_packed ? last_position / kPageTokens + 1 : item_begin;
    if (page_begin > run.order_begin) run.order_begin = page_begin;
    run.order_end = min(run.order_end, page_end);
    if (i != warpgroup) continue;
    run.packed_begin = packed_begin;
    run.num_packed = num_packed;
    run.page_begin = page_begin;
    run.page_end = page_end;
    run.skip_before = page_begin - item_begin;
    run.skip_after = item_end - page_end;
    set_mask_pages(run, first_position, last_position, op.window);
  }
  if (run.order_end < run.order_begin) run.order_end = run.order_begin;
  run.patch_page = run.key_end % kPageTokens ? run.key_end / kPageTokens : kNoPatchPage;
  run.first_split = 0;
  if (run.num_packed) set_plain_pages(run);
}

}  // namespace blinkimp
