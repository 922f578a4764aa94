// Which warpgroup computes what in attention: planned once a step, from the plan alone, by a warp of its own in every CTA. GPU only.
//
// A request's share of the step (PlanSeq) is worked on in one of two ways; both give the same bits (attention_math.cuh):
//   narrow  one row (decode). Units (row, kv head) of splits; all splits of a step stand in one list, cut by pages into one contiguous range
//           for each warpgroup of the grid. A unit that several warpgroups share meets again in attention_merge.cuh.
//   wide    several rows (prefill chunk), or one behind pages that others fill in this step: items (tile of 128 packed rows, kv head), each over all its keys; the longest first, dealt to the
//           CTAs to and fro. Packed row p of a share is head p % group of the row's group, token p / group; each warpgroup takes 64. So few that
//           there is a CTA for each tile of 64: then these are the items, because a warpgroup alone is sooner through its pages than two.
// CTAs with more wide work get shorter narrow ranges. A step has one wide list and a narrow one per window size among the layers.
// I1 Every CTA computes the same cuts: from the same plan, with the same integer and double arithmetic.
// I2 The producer and the two warpgroups walk the same ranges in the same order.
// Called by device/attention.cuh, attention_producer.cuh. Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <attention_math.cuh>
#include <kv_layout.cuh>
#include <step_plan.cuh>
#include <worker_memory.cuh>

namespace blinkimp {

constexpr u32 kTileRows = 64;     // wgmma's M: packed rows of a warpgroup
constexpr u32 kNarrowRows = 16;   // heads of a group that a decode row may have: one warp's rows. Larger groups are computed wide
constexpr u32 kMaxWindows = 2;    // window sizes among the layers of a model
constexpr u32 kMaxSeqs = 256;     // of a step: kMaxBatch of director_state.cuh
constexpr u32 kWarpgroupThreads = 128;
constexpr u32 kWsAttentionCounters = kNumWorkspaces - 1;  // EngineParams.workspaces: u32 [max_batch * num_kv_heads], zero between ops

// A walk over a range of the list of splits. It stands at `page` of unit (seq_idx, kv_head), or at that unit's end.
struct NarrowWalk {
  u32 seq_idx;
  u32 kv_head;
  u32 page;
  u32 num_pages;    // left in the range
  u32 item_idx;     // number of the split at `page` in the step's list
  u32 row;          // of the sequence seq_idx, as the next three
  u32 position;
  u32 request_idx;
  u32 last_page_id; // of the page that `position` lies in
  u32 reserved0;
};

// The producer's walk for one warpgroup.
struct ProducerWalk {
  NarrowWalk walk;
  u32 num_pages;  // left in the walk's run of pages
  u32 page_id;    // of the page at walk.page
};

struct WideWalk {
  u32 round;         // of dealing
  u32 seq_idx;       // of the share that the last item was in
  u32 items_before;  // of the shares before it
};

struct WideItem {
  u32 seq_idx;
  u32 kv_head;
  u32 tile_begin;  // packed rows [tile_begin, tile_end)
  u32 tile_end;
};

struct WindowSchedule {
  u32 window;            // tokens, 0 = none
  u32 reserved0;
  NarrowWalk narrow[2];  // this CTA's two ranges, by warpgroup
};

enum RunKind : u32 { kRunEnd = 0, kRunNarrow = 1, kRunWide = 2 };

// What a warpgroup works on: consecutive pages of one unit or wide item.
struct AttentionRun {
  u32 kind;
  u32 group;           // heads of a kv head
  u32 group_reciprocal;
  u32 kv_head;
  u32 row_begin;       // the share's first row in the step
  u32 position_begin;  // and its position
  u32 packed_begin;    // packed rows [packed_begin, packed_begin + num_packed), at most 64
  u32 num_packed;
  u32 page_begin;      // pages [page_begin, page_end) are computed
  u32 page_end;
  u32 joins;           // wide: the first item
  u32 skip_before;     // wide: pages of the item before and after that the other warpgroup needs alone
  u32 skip_after;
  u32 order_begin;     // wide: pages [order_begin, order_end) are computed by both warpgroups, which then take turns
  u32 order_end;
  u32 mask_from;       // pages >= mask_from or < mask_until hold keys that some row must not see
  u32 mask_until;
  u32 plain_begin;     // pages [plain_begin, plain_begin + num_plain): in turn if wide, and the page after is neither masked nor patched
  u32 num_plain;
  u32 key_end;         // keys at and after it do not exist
  u32 patch_page;      // the page that key_end lies in, if it is computed here; else ~0
  u32 query_offset;    // bytes from the scratch to the run's first row, in the warpgroup's query tile: narrow runs take turns at two places in it
  u32 new_row_offset;  // narrow: likewise, to the row's new key and value
  u64 patch_source;    // narrow: K tile of patch_page in the cache
  u32 unit_idx;        // narrow: counter of the unit
  u32 item_begin;      // narrow: number of the unit's first split
  u32 num_splits;      // narrow: of the unit
  u32 window;
  u32 first_split;     // narrow: of the run, within the unit; 0: the run folds its splits, else it leaves them one by one
};

// A step's schedule, and what the producer keeps. Read by the producer, which runs ahead of the op, and by the compute threads.
struct AttentionShared {
  u64 schedule_ready;                   // mbarrier, a phase per step: the planning warp has written the rest
  u32 group;                            // query heads of a kv head (a division otherwise)
  u32 group_reciprocal;                 // group_reciprocal_of(group)
  u32 num_windows;
  u32 num_wide_items;
  u32 wide_rows;                        // packed rows of a wide item: 64 or 128
  u32 wide_seqs[kMaxSeqs / 32];         // bit i of word w: share 32w + i is computed wide
  WindowSchedule windows[kMaxWindows];  // [num_windows]
  ProducerWalk producer_walks[2];       // [warpgroup] writer and reader: the producer
};

// What the compute threads keep during the op, in its scratch: the loop over pages leaves no registers for it.
struct AttentionState {
  const Op* op;             // as the next one: writer thread 0, before a barrier at the op's start
  const StepPlan* plan;     // of the step
  NarrowWalk walks[2];      // [warpgroup] where each warpgroup is; writer and reader: its scout (attention.cuh)
  WideWalk wide_walks[2];   // likewise
  WideItem wide_items[2];   // likewise, the item that it stands at
  u32 messages[2];          // [warpgroup] writer: its first thread, between two of its barriers
  AttentionRun runs[2][2];  // [warpgroup][slot] the run and the next one; writer: its scout, while nobody reads that slot
};

BK_INLINE AttentionShared& attention_shared(u8* shared_memory) {
  static_assert(sizeof(AttentionShared) <= kAttentionBlockBytes, "its place in the shared memory map");
  return *reinterpret_cast<AttentionShared*>(shared_memory + kAttentionBlockOffset);
}

BK_INLINE u32 group_of(const EngineParams& params) { return params.dims.num_heads / params.dims.num_kv_heads; }

// value / group by a product: a division takes a hundred clk, and one thread that finds a run makes ten. Exact for value * group < 2^32, as with packed rows
// it is by far: the excess of ceil(2^32 / group) over 2^32 / group is less than 1, and the quotient's, value / 2^32 of that, less than 1 / group.
BK_INLINE u32 group_reciprocal_of(u32 group) { return group == 1 ? 0 : 0xffffffffu / group + 1; }
BK_INLINE u32 divide_by_group(u32 value, u32 reciprocal) { return reciprocal == 0 ? value : static_cast<u32>(static_cast<u64>(value) * reciprocal >> 32); }

// (sequence, split) pairs that a step can have: there is room for their partial results, attention_part_bytes() of host/gpu_memory.py.
BK_INLINE u64 attention_slots(const EngineParams& params) {
  return static_cast<u64>(params.max_batch) * ((params.max_pages_per_request + kSplitPages - 1) / kSplitPages);
}

// The first key that a row at `position` sees.
BK_INLINE u32 first_visible_key(u32 position, u32 window) { return window != 0 && position + 1 > window ? position + 1 - window : 0; }
BK_INLINE u32 first_page(u32 position, u32 window) { return first_visible_key(position, window) / kPageTokens; }
BK_INLINE u32 splits_between(u32 page_begin, u32 page_end) { return (page_end - 1) / kSplitPages - page_begin / kSplitPages + 1; }

BK_INLINE bool is_wide(const AttentionShared& attention, u32 seq_idx) { return attention.wide_seqs[seq_idx / 32] >> seq_idx % 32u & 1u; }

BK_INLINE const u32* page_table_of(const EngineParams& params, u32 request_idx) {
  return reinterpret_cast<const u32*>(params.page_tables) + static_cast<u64>(request_idx) * params.max_pages_per_request;
}

BK_INLINE const WindowSchedule& schedule_of(const AttentionShared& attention, u32 window) {
  u32 i = 0;
  while (i + 1 < attention.num_windows && attention.windows[i].window != window) i++;
  return attention.windows[i];
}

// ---- Walks -------------------------------------------------------------------------------------------------------
// kHasLast: last_page_id, too, which costs a load and which the producer does not need.
template <bool kHasLast>
BK_INLINE void enter_sequence(const EngineParams& params, const PlanSeq& seq, NarrowWalk& walk) {
  walk.row = seq.row_begin;
  walk.position = seq.position_begin;
  walk.request_idx = seq.request_idx;
  if constexpr (kHasLast) walk.last_page_id = page_table_of(params, seq.request_idx)[seq.position_begin / kPageTokens];
}

// Steps to the next unit's first page if the walk stands at a unit's end. False: the range is done.
template <bool kHasLast = true>
BK_INLINE bool normalise(const EngineParams& params, const PlanSeq* seqs, const AttentionShared& attention, u32 window, NarrowWalk& walk) {
  if (walk.num_pages == 0) return false;
  if (walk.page <= walk.position / kPageTokens) return true;
  if (++walk.kv_head == params.dims.num_kv_heads) {
    walk.kv_head = 0;
    do {
      walk.seq_idx++;
    } while (is_wide(attention, walk.seq_idx));
    enter_sequence<kHasLast>(params, seqs[walk.seq_idx], walk);
  }
  walk.page = first_page(walk.position, window);
  return true;
}

// Pages from walk.page on that belong to its unit and range.
BK_INLINE u32 run_pages(const NarrowWalk& walk) {
  const u32 in_unit = walk.position / kPageTokens + 1 - walk.page;
  return in_unit < walk.num_pages ? in_unit : walk.num_pages;
}

// Pages [begin, end) that the item's rows see; position_begin: of its share.
BK_INLINE u32 wide_page_begin(const WideItem& item, u32 position_begin, u32 reciprocal, u32 window) { return first_page(position_begin + divide_by_group(item.tile_begin, reciprocal), window); }
BK_INLINE u32 wide_page_end(const WideItem& item, u32 position_begin, u32 reciprocal) { return (position_begin + divide_by_group(item.tile_end - 1, reciprocal)) / kPageTokens + 1; }

// This CTA's next wide item. False: there is none.
BK_INLINE bool next_wide_item(const EngineParams& params, const PlanSeq* seqs, const AttentionShared& attention, WideWalk& walk, WideItem* item) {
  const u32 place = walk.round % 2u ? params.num_workers - 1 - cta_idx() : cta_idx();
  const u32 item_idx = walk.round++ * params.num_workers + place;
  if (item_idx >= attention.num_wide_items) return false;
  const u32 num_kv_heads = params.dims.num_kv_heads;
  const u32 group = attention.group;
  for (;; walk.seq_idx++) {
    if (!is_wide(attention, walk.seq_idx)) continue;
    const PlanSeq& seq = seqs[walk.seq_idx];
    const u32 num_packed = seq.num_rows * group;
    const u32 num_tiles = (num_packed + attention.wide_rows - 1) / attention.wide_rows;
    const u32 within = item_idx - walk.items_before;
    if (within < num_tiles * num_kv_heads) {
      item->seq_idx = walk.seq_idx;
      item->kv_head = within % num_kv_heads;
      item->tile_begin = (num_tiles - 1 - within / num_kv_heads) * attention.wide_rows;  // the longest first
      item->tile_end = min(item->tile_begin + attention.wide_rows, num_packed);
      return true;
    }
    walk.items_before += num_tiles * num_kv_heads;
  }
}

}  // namespace blinkimp
