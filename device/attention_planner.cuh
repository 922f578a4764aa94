// The schedule of a step's attention: one warp of every CTA writes its CTA's share into shared memory while the step's first ops run. GPU only.
//
// Passes over the shares, 32 at a time, one a lane: which are narrow and how much wide work there is; then, for each window size, how many narrow pages, whether
// cuts stand between units alone, and the places of this CTA's three cuts.
// Called by device/scale_producer.cuh (warp 10). Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once
#include <attention_schedule.cuh>

namespace blinkimp {

BK_INLINE u32 warp_sum(u32 value) {
  for (u32 distance = 16; distance; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

BK_INLINE u32 warp_max(u32 value) {
  for (u32 distance = 16; distance; distance /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

BK_INLINE u32 warp_scan(u32 value, u32 lane) {  // inclusive
  for (u32 distance = 1; distance < 32; distance *= 2) {
    const u32 below = __shfl_up_sync(0xffffffffu, value, distance);
    if (lane >= distance) value += below;
  }
  return value;
}

// Pages of wide items, summed over the step.
struct WideWork {
  u32 num_items;
  u32 num_pages;
};

// Writes wide_seqs, wide_rows and num_wide_items.
BK_INLINE WideWork plan_wide(const EngineParams& params, const StepPlan* plan, AttentionShared& attention, u32 lane) {
  const PlanSeq* seqs = plan_seqs(params, plan);
  const u32 num_kv_heads = params.dims.num_kv_heads;
  WideWork work[2] = {{0, 0}, {0, 0}};  // in items of 64 rows, of 128
  for (u32 seq_begin = 0; seq_begin < plan->num_seqs; seq_begin += 32) {
    const u32 seq_idx = seq_begin + lane;
    const bool live = seq_idx < plan->num_seqs;
    const PlanSeq seq = seqs[live ? seq_idx : 0];
    const bool wide = live && (seq.num_rows != 1 || seq.prefix_is_fresh || attention.group > kNarrowRows);
    const u32 wide_lanes = __ballot_sync(0xffffffffu, wide);
    const u32 num_rows = wide ? seq.num_rows * attention.group : 0;
    const u32 first_pages = seq.position_begin / kPageTokens + 1;
    const u32 last_pages = (seq.position_begin + seq.num_rows - 1) / kPageTokens + 1;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const u32 num_tiles = (num_rows + (i + 1) * kTileRows - 1) / ((i + 1) * kTileRows);
      work[i].num_items += warp_sum(num_tiles * num_kv_heads);
      work[i].num_pages += warp_sum((num_tiles * (first_pages + last_pages) + 1) / 2 * num_kv_heads);
    }
    if (lane == 0) attention.wide_seqs[seq_begin / 32] = wide_lanes;
  }
  const u32 chosen = work[0].num_items <= params.num_workers ? 0 : 1;
  if (lane == 0) {
    attention.wide_rows = (chosen + 1) * kTileRows;
    attention.num_wide_items = work[chosen].num_items;
  }
  __syncwarp();  // is_wide() below reads what lane 0 wrote
  return WideWork{chosen ? work[1].num_items : work[0].num_items, chosen ? work[1].num_pages : work[0].num_pages};
}

// How the list of narrow pages is cut among the 2 * num_workers warpgroups: evenly, except that a CTA's wide items count against its share.
struct NarrowCuts {
  double capacity_more;  // of a CTA that gets one wide item more than others
  double capacity_less;
  u32 num_more;       // such CTAs: the first, or in an odd round of dealing the last
  bool from_end;

  BK_INLINE NarrowCuts(const EngineParams& params, const WideWork& work, u32 num_pages) {
    const WideWork wide{opaque(work.num_items), opaque(work.num_pages)};  // or doubles made of it live through all window sizes
    const double num_ctas = params.num_workers;
    if (wide.num_items == 0) {
      capacity_more = capacity_less = 1.0;
      num_more = 0;
      from_end = false;
      return;
    }
    const u32 num_rounds = wide.num_items / params.num_workers;
    const double item_pages = static_cast<double>(wide.num_pages) / wide.num_items;
    const double even = (static_cast<double>(num_pages) + wide.num_pages) / num_ctas;
    const double less = even - num_rounds * item_pages;
    const double more = less - item_pages;
    capacity_less = less > 0.0 ? less : 0.0;
    capacity_more = more > 0.0 ? more : 0.0;
    num_more = wide.num_items % params.num_workers;
    from_end = num_rounds % 2u != 0;
  }

  // The first page of a warpgroup, 0 .. 2 * num_ctas, before rounding to a split. Of 2 * num_ctas: num_pages.
  BK_INLINE u32 place(u32 num_ctas, u32 warpgroup_idx, u32 num_pages) const {
    const u32 cta = warpgroup_idx / 2;
    if (cta == num_ctas) return num_pages;
    const u32 first_more = from_end ? num_ctas - num_more : 0;
    const u32 more_before = cta <= first_more ? 0 : min(cta - first_more, num_more);
    const bool is_more = cta >= first_more && cta < first_more + num_more;
    const double before = more_before * capacity_more + (cta - more_before) * capacity_less + (is_more ? capacity_more : capacity_less) * 0.5 * (warpgroup_idx % 2);
    const double total = num_more * capacity_more + (num_ctas - num_more) * capacity_less;
    return static_cast<u32>(before / total * num_pages);
  }
};

// The cut between a CTA's warpgroups, moved to where both end their units at the same time, if that is near: the end of a unit holds up the other warpgroup, too,
// whose pages stand behind in the ring. `place`: within a share of num_units units of unit_pages each. Decode of equal contexts, 256 rows: a CTA with units
// that end together was done with its pages after 420k clk, one without after 450k (PERFORMANCE.md).
BK_INLINE u32 aligned_place(u32 place, u32 first_offset, u32 unit_pages, u32 num_units, u32 warpgroup_pages) {
  constexpr u32 kLeastPerMoved = 7;  // pages that a warpgroup has for each that moves
  if (first_offset >= unit_pages) return place;
  const u32 unit = place + unit_pages / 2 <= first_offset ? 0 : min((place + unit_pages / 2 - first_offset) / unit_pages, num_units - 1);
  const u32 aligned = unit * unit_pages + first_offset;
  const u32 moved = aligned > place ? aligned - place : place - aligned;
  return moved * kLeastPerMoved <= warpgroup_pages ? aligned : place;
}

// Units that each warpgroup takes whole, or 0 where cutting the list of pages anywhere is sooner done. A unit that two CTAs share costs 5.7 us of the op at any
// size, as much as a CTA takes for six of its pages (PERFORMANCE.md, tenth state); whole units leave some CTAs without work, and others with longer units than the mean.
BK_INLINE u32 whole_units(u32 num_workers, const WideWork& wide, u32 num_units, u32 num_pages, u32 most_unit_pages) {
  constexpr u32 kPagesOfShared = 6;
  const u32 num_units_each = (num_units + 2 * num_workers - 1) / (2 * num_workers);
  const bool is_sooner = 2 * num_units_each * most_unit_pages <= (num_pages + num_workers - 1) / num_workers + kPagesOfShared;
  return wide.num_items == 0 && is_sooner ? num_units_each : 0;
}

// Writes one WindowSchedule.
BK_INLINE void plan_narrow(const EngineParams& params, const StepPlan* plan, AttentionShared& attention, WindowSchedule& schedule, const WideWork& wide, u32 lane) {
  const PlanSeq* seqs = plan_seqs(params, plan);
  const u32 num_kv_heads = params.dims.num_kv_heads;
  const u32 window = schedule.window;
  u32 num_units = 0;  // a sequence's keys and values of one head
  u32 num_pages = 0;
  u32 most_unit_pages = 0;
  for (u32 seq_idx = lane; seq_idx < plan->num_seqs; seq_idx += 32) {
    const PlanSeq& seq = seqs[seq_idx];
    if (is_wide(attention, seq_idx)) continue;
    const u32 unit_pages = seq.position_begin / kPageTokens + 1 - first_page(seq.position_begin, window);
    num_units += num_kv_heads;
    num_pages += unit_pages * num_kv_heads;
    most_unit_pages = max(most_unit_pages, unit_pages);
  }
  num_units = warp_sum(num_units);
  num_pages = warp_sum(num_pages);
  most_unit_pages = warp_max(most_unit_pages);
  if (lane < 2) schedule.narrow[lane].num_pages = 0;
  __syncwarp();  // before the lanes that find the cuts write the same walks
  if (num_pages == 0) return;

  // Where units stay whole, each counts as the longest one: then a cut, which is a multiple of that, stands between two of them.
  const u32 num_whole = whole_units(params.num_workers, wide, num_units, num_pages, most_unit_pages);
  const u32 cut_idx = 2 * cta_idx() + min(lane, 2);
  const u32 own_place = num_whole ? cut_idx * num_whole * most_unit_pages : NarrowCuts(params, wide, num_pages).place(params.num_workers, cut_idx, num_pages);
  u32 places[3];  // this CTA's cuts, in pages as they count, before rounding up to a split's first page
#pragma unroll
  for (u32 i = 0; i < 3; ++i) places[i] = __shfl_sync(0xffffffffu, own_place, i);
  u32 counted_before = 0;
  u32 pages_before = 0;
  u32 items_before = 0;
  u32 rounded[3] = {num_pages, num_pages, num_pages};
  u32 first_offset = 0;  // of this CTA's first page within its unit
  for (u32 seq_begin = 0; seq_begin < plan->num_seqs; seq_begin += 32) {
    const u32 seq_idx = seq_begin + lane;
    const PlanSeq seq = seqs[seq_idx < plan->num_seqs ? seq_idx : 0];
    const bool narrow = seq_idx < plan->num_seqs && !is_wide(attention, seq_idx);
    const u32 begin = first_page(seq.position_begin, window);
    const u32 end = seq.position_begin / kPageTokens + 1;
    const u32 unit_pages = num_whole ? most_unit_pages : end - begin;  // as they count
    const u32 counted = narrow ? unit_pages * num_kv_heads : 0;
    const u32 num_seq_pages = narrow ? (end - begin) * num_kv_heads : 0;
    const u32 num_items = narrow ? splits_between(begin, end) * num_kv_heads : 0;
    const u32 counted_after = counted_before + warp_scan(counted, lane);
    const u32 pages_after = pages_before + warp_scan(num_seq_pages, lane);
    const u32 items_after = items_before + warp_scan(num_items, lane);
#pragma unroll
    for (u32 i = 0; i < 3; ++i) {
      const u32 first = counted_after - counted;
      const bool here = counted != 0 && places[i] >= first && places[i] < counted_after;
      u32 at = 0;
      if (here) {
        const u32 within = i == 1 ? aligned_place(places[1] - first, first_offset, unit_pages, num_kv_heads, places[1] - places[0]) : places[i] - first;
        const u32 head = within / unit_pages;
        u32 page = begin + within % unit_pages;
        if (page != begin) {
          page = (page + kSplitPages - 1) / kSplitPages * kSplitPages;
          if (page + 1 >= end) page = end;  // a last split of one page goes with the one before: by itself, it would be a run more of some warpgroup
        }
        at = pages_after - num_seq_pages + head * (end - begin) + page - begin;
        if (i < 2) {
          NarrowWalk& walk = schedule.narrow[i];
          walk.seq_idx = seq_idx;
          walk.kv_head = head;
          walk.page = page;
          walk.item_idx = items_after - num_items + head * splits_between(begin, end) + (page == end ? splits_between(begin, end) : page / kSplitPages - begin / kSplitPages);
          enter_sequence<true>(params, seq, walk);
        }
      }
      const u32 finders = __ballot_sync(0xffffffffu, here);
      if (finders) {
        const u32 finder = static_cast<u32>(__ffs(static_cast<int>(finders))) - 1;
        rounded[i] = __shfl_sync(0xffffffffu, at, finder);
        if (i == 0) first_offset = __shfl_sync(0xffffffffu, counted ? (at - (pages_after - num_seq_pages)) % (end - begin) : 0, finder);
      }
    }
    counted_before = __shfl_sync(0xffffffffu, counted_after, 31);
    pages_before = __shfl_sync(0xffffffffu, pages_after, 31);
    items_before = __shfl_sync(0xffffffffu, items_after, 31);
  }
  __syncwarp();  // the walks are written by the lanes that found them
  if (lane < 2) {
    NarrowWalk& walk = schedule.narrow[lane];
    walk.num_pages = lane == 0 ? rounded[1] - rounded[0] : rounded[2] - rounded[1];
    normalise(params, seqs, attention, window, walk);  // so that an op's first run needs nothing from global memory
  }
}

// Once, before the first step: the window sizes among the program's layers. All lanes of the planning warp.
BK_INLINE void find_windows(const EngineParams& params, AttentionShared& attention) {
  const u32 lane = thread_idx() % 32u;
  const Op* ops = reinterpret_cast<const Op*>(params.ops);
  u32 num_windows = 0;
  u32 windows[kMaxWindows] = {};
  for (u32 op_begin = 0; op_begin < params.num_ops; op_begin += 32) {
    const u32 op_idx = op_begin + lane;
    bool is_new = op_idx < params.num_ops && ops[op_idx].kind == kOpAttention;
    const u32 window = is_new ? ops[op_idx].window : 0;
    for (;;) {
#pragma unroll
      for (u32 i = 0; i < kMaxWindows; ++i) is_new = is_new && !(i < num_windows && windows[i] == window);
      const u32 finders = __ballot_sync(0xffffffffu, is_new);
      if (!finders) break;
      const u32 found = __shfl_sync(0xffffffffu, window, static_cast<u32>(__ffs(static_cast<int>(finders))) - 1);
      if (num_windows == kMaxWindows) fail(params, kFaultBadProgram, kSiteAttentionWindows, kMaxWindows, found);
#pragma unroll
      for (u32 i = 0; i < kMaxWindows; ++i) {
        if (i == num_windows) windows[i] = found;
      }
      num_windows++;
    }
  }
  if (lane == 0) {
    attention.group = group_of(params);
    attention.group_reciprocal = group_reciprocal_of(attention.group);
    attention.num_windows = num_windows;
#pragma unroll
    for (u32 i = 0; i < kMaxWindows; ++i) attention.windows[i].window = windows[i];
  }
  __syncwarp();
}

// All lanes of the planning warp, once a step; plan is acquired by them. The previous step's attention is over: the plan came after it.
BK_INLINE void plan_attention(const EngineParams& params, const StepPlan* plan, AttentionShared& attention) {
  const u32 lane = thread_idx() % 32u;
  const WideWork wide = plan_wide(params, plan, attention, lane);
  for (u32 i = 0; i < attention.num_windows; ++i) plan_narrow(params, plan, attention, attention.windows[i], wide, lane);
  __syncwarp();  // all lanes' words are written before lane 0 arrives
  if (lane == 0) mbarrier_arrive(&attention.schedule_ready);  // pairs with wait_schedule()
}

}  // namespace blinkimp
