// Which CTA computes what in attention: every warp finds its items from the plan alone, without tables or messages. GPU only.
//
// A request's share of the step (PlanSeq) is worked on in one of two ways; both give the same bits (attention_math.cuh):
//   narrow  one row (decode): items (split, 16-row tile of the group's heads, kv head). Partial results go to slots of a workspace and
//           are combined after a grid barrier, except when the row has one split: it is finished at once.
//   wide    several rows (prefill chunk): items (tile of 128 packed rows, kv head), each over all its keys. Packed row p of a tile is head
//           p % group of the row's group, token p / group of the share.
// Slots are given out in plan order; a share that finds none left is computed wide. Items are numbered over the plan and go to CTAs in
// turn. A cursor walks the plan 32 shares at a time (one per lane) as the item number grows.
// Called by device/portable/attention_*.cuh. Test: pytest tests/host/test_attention_simt.py
#pragma once
#include <portable/attention_math.cuh>

namespace blinkimp {

constexpr u32 kWideRows = 128;   // 8 warps x 16
constexpr u32 kNarrowRows = 16;

struct AttentionArgs {
  const PlanSeq* seqs;        // [num_seqs]
  u32 num_seqs;
  u32 num_heads;
  u32 num_kv_heads;
  u32 group;                  // num_heads / num_kv_heads
  u32 window;                 // tokens, 0 = none
  u32 max_pages_per_request;
  f32 scale;                  // attention_scale * log2(e)
  u32 cta_idx;
  u32 num_ctas;
  u32 num_slots;              // of the two workspaces below
  const u32* page_tables;     // [num_requests, max_pages_per_request]
  const u16* query;           // bf16 [rows, num_heads, head_dim]
  const u16* kv;              // bf16 [num_pages, num_kv_heads, 2, kPageTokens, head_dim]: this layer's pages
  f32* part_outputs;          // [num_slots, num_heads, head_dim], not divided by the sum
  float2* part_softmax;       // [num_slots, num_heads]: maximum, sum
};
ABI_SIZE(AttentionArgs, 88);  // the tests' numpy record: tests/attention_reference.py

// One item of the wide phase; equal for all threads of a CTA.
struct WideItem {
  u32 seq_idx;
  u32 kv_head;
  u32 tile_begin;  // packed rows [tile_begin, tile_last]
  u32 tile_last;
  u32 page_begin;
  u32 page_end;
};

// What the compute threads of a CTA share beside the scratch. It stands in shared memory, because they have no registers to spare: the
// caller fills args (with cta_idx, num_ctas) once, a barrier follows.
struct AttentionShared {
  AttentionArgs args;
  WideItem item;  // writer: thread 0, between two barriers
};

// Slots for every request of a batch at its longest context: no share has to go wide for want of one. Fewer are correct too.
BK_INLINE u64 attention_slots(u32 max_batch, u32 max_pages_per_request) {
  return static_cast<u64>(max_batch) * ((max_pages_per_request + kSplitPages - 1) / kSplitPages);
}

// The first key that a row at `position` sees.
BK_INLINE u32 first_visible_key(u32 position, u32 window) { return window != 0 && position + 1 > window ? position + 1 - window : 0; }

enum class AttentionPhase { kWide, kNarrow, kCombine };

struct FoundItem {
  u32 seq_idx;
  u32 item;        // number within the share
  u32 slot_begin;  // narrow with several splits
};

// Finds items of one phase in rising order. All lanes of a warp call it together with equal arguments.
template <AttentionPhase kPhase>
struct ItemCursor {
  u32 seq_begin = 0;    // first share of the current 32
  u32 items_before = 0;
  u32 slots_before = 0;

  // False: there is no such item; items_before is then the number of all items.
  BK_INLINE bool find(const AttentionArgs& args, u32 item_idx, FoundItem* found) {
    const u32 lane = opaque(threadIdx.x) % 32u;
    while (seq_begin < args.num_seqs) {
      const u32 seq_idx = seq_begin + lane;
      u32 num_rows = 0;
      u32 num_splits = 0;
      if (seq_idx < args.num_seqs) {
        num_rows = args.seqs[seq_idx].num_rows;
        const u32 position = args.seqs[seq_idx].position_begin;
        num_splits = position / kSplitTokens + 1 - first_visible_key(position, args.window) / kSplitTokens;
      }
      const u32 num_slots = num_rows == 1 && num_splits > 1 ? num_splits : 0;
      const u32 slots_through = inclusive_sum(num_slots, lane);
      const bool narrow = num_rows == 1 && slots_before + slots_through <= args.num_slots;
      u32 num_items = 0;
      if (kPhase == AttentionPhase::kWide && num_rows != 0 && !narrow) {
        num_items = (num_rows * args.group + kWideRows - 1) / kWideRows * args.num_kv_heads;
      }
      if (kPhase == AttentionPhase::kNarrow && narrow) {
        num_items = num_splits * ((args.group + kNarrowRows - 1) / kNarrowRows) * args.num_kv_heads;
      }
      if (kPhase == AttentionPhase::kCombine && narrow && num_splits > 1) num_items = args.num_heads;
      const u32 items_through = inclusive_sum(num_items, lane);
      const u32 owners = __ballot_sync(0xffffffffu, item_idx - items_before < items_through);
      if (owners != 0) {
        const u32 owner = static_cast<u32>(__ffs(static_cast<int>(owners))) - 1u;
        found->seq_idx = seq_begin + owner;
        found->item = item_idx - items_before - __shfl_sync(0xffffffffu, items_through - num_items, owner);
        found->slot_begin = slots_before + __shfl_sync(0xffffffffu, slots_through - num_slots, owner);
        return true;
      }
      items_before += __shfl_sync(0xffffffffu, items_through, 31);
      slots_before += __shfl_sync(0xffffffffu, slots_through, 31);
      seq_begin += 32;
    }
    return false;
  }

  BK_INLINE static u32 inclusive_sum(u32 value, u32 lane) {
#pragma unroll
    for (u32 distance = 1; distance < 32; distance *= 2) {
      const u32 below = __shfl_up_sync(0xffffffffu, value, distance);
      if (lane >= distance) value += below;
    }
    return value;
  }
};

}  // namespace blinkimp
