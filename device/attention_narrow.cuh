// A run of narrow pages with the operands of wgmma exchanged: keys and dimensions are its M, the group's heads its N of 8. GPU only.
//
// A decode row has as many query rows as its kv head has heads, 4 with Llama-3-8B, and wgmma's M is 64: attention.cuh multiplies 16 times what exists. Here
// scores are keys x heads and outputs dimensions x heads, 8 times less, for power (PERFORMANCE.md). The sums are the same ones, bit for bit: products
// add up over k as they do there, and the softmax adds in the order of attention_math.cuh.
// Each warp has 16 keys of a page, so a page's maximum goes over shared memory, and so do its exponentials: as bf16 for the product with V, as they are for the
// sums, which the first warp makes: lane 4q + p has what lane p of a quad of attention_math.cuh has of row q.
// Fragments: thread t of a warpgroup holds heads 2(t mod 4) + {0, 1} of keys (dimensions) g = 16(t / 32) + (t mod 32) / 4 and g + 8 in d[0..1], d[2..3].
// Called by device/attention.cuh. Test: pytest tests/host/test_attention_sm90_simt.py; pytest -m gpu tests/gpu/test_attention_sm90.py
#pragma once
#include <attention_merge.cuh>
#include <attention_plain.cuh>

namespace blinkimp {

constexpr u32 kSwappedHeads = 8;  // wgmma's least N. Groups of more heads are computed by compute_run()
constexpr u32 kExponentialStride = kPageTokens + 4;  // words from head to head: the lanes of a warp store to banks of their own

// Places in the warpgroup's query tile that narrow runs leave free (attention_runs.cuh), bytes. The weights of a page, bf16 [head][key] swizzled as K is, stand
// behind the query rows of either slot.
constexpr u32 kSwappedWeightsOffset = kSwappedHeads * kKvBlockDims * 2;                            // + page mod 2 * kNarrowQueryBytes
constexpr u32 kExponentialsOffset = kNewRowOffset + 2 * kNewRowBytes;                              // f32 [head][kExponentialStride]
constexpr u32 kMaximaOffset = kExponentialsOffset + kSwappedHeads * kExponentialStride * 4;        // f32 [warp][head]
constexpr u32 kInversesOffset = kMaximaOffset + 4 * kSwappedHeads * 4;                             // f32 [head]
static_assert(kSwappedWeightsOffset % 1024 == 0 && 2 * kSwappedWeightsOffset <= kNarrowQueryBytes, "aligned as wgmma wants it, in rows that no query has");
static_assert(kSwappedHeads * kPageTokens * 2 <= kSwappedWeightsOffset && kInversesOffset + kSwappedHeads * 4 <= kKvBlockBytes, "within the tile's first block");

// f32 [head][dimension], of a run that ends: in the second block's free rows, else where the exponentials were.
template <int kHeadDim>
constexpr u32 kSwappedOutputsOffset = kHeadDim > 64 ? kKvBlockBytes + 2 * kNarrowQueryBytes : kExponentialsOffset;

// Of a head's value that each quad's lane c has for heads 2c and 2c + 1: that of head lane / 4. All lanes of a warp.
BK_INLINE f32 of_quads_head(const f32 (&pair)[2]) {
  const u32 lane = thread_idx() % 32u;
  const f32 even = __shfl_sync(0xffffffffu, pair[0], lane / 8u);
  const f32 odd = __shfl_sync(0xffffffffu, pair[1], lane / 8u);
  return lane / 4u % 2u ? odd : even;
}

// A split's softmax so far.
struct SwappedSoftmax {
  f32 maximum[2];  // of this thread's two heads
  f32 sum;         // first warp: this lane's part of head lane / 4

  // first_maximum: what the maxima begin with, [head]
  BK_INLINE void reset(const f32 (&first_maximum)[2]) {
    maximum[0] = first_maximum[0];
    maximum[1] = first_maximum[1];
    sum = 0.0f;
  }
};

// The maximum of a head that the group lacks: no score reaches it, so its exponentials are zeros, and products with zeros cost less power.
constexpr f32 kNobodysMaximum = 3e38f;

// Where this thread's part of a page's softmax stands in the warpgroup's tile. Worked out once a run: for each page it was a fifth of the loop's instructions.
struct SwappedPlaces {
  float2* own_maxima;        // of the thread's warp; lanes 0 to 3 write
  const float2* all_maxima;  // [warp], kSwappedHeads / 2 apart
  f32* exponentials;         // of the first key and head
  u8* weights[2][2];         // [half][head] of even pages
  bool writes_maxima;

  BK_INLINE explicit SwappedPlaces(u8* tile) {
    const u32 thread = thread_idx() % kWarpgroupThreads;
    const u32 lane = thread % 32u;
    const u32 key = thread / 32u * 16u + lane / 4u;
    const u32 head = lane % 4u * 2u;
    all_maxima = reinterpret_cast<const float2*>(tile + kMaximaOffset) + lane % 4u;
    own_maxima = reinterpret_cast<float2*>(tile + kMaximaOffset) + thread / 32u * (kSwappedHeads / 2) + lane % 4u;
    exponentials = reinterpret_cast<f32*>(tile + kExponentialsOffset) + head * kExponentialStride + key;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
#pragma unroll
      for (u32 i = 0; i < 2; ++i) weights[half][i] = tile + kSwappedWeightsOffset + (head + i) * (kPageTokens * 2) + ((key / 8u + half) ^ (head + i)) * 16u + key % 8u * 2u;
    }
    writes_maxima = lane < 4;
  }
};

// softmax_block() of a page; then the exponentials stand in shared memory, visible to wgmma. factors: of this thread's two heads.
BK_INLINE void weigh_swapped(const SwappedPlaces& places, u32 page, f32 (&scores)[4], f32 scale, SwappedSoftmax& state, f32 (&factors)[2]) {
  f32 maximum[2] = {fmaxf(scores[0], scores[2]), fmaxf(scores[1], scores[3])};
#pragma unroll
  for (u32 distance = 4; distance <= 16; distance *= 2) {
    const f32 others[2] = {__shfl_xor_sync(0xffffffffu, maximum[0], distance), __shfl_xor_sync(0xffffffffu, maximum[1], distance)};
#pragma unroll
    for (u32 i = 0; i < 2; ++i) maximum[i] = fmaxf(maximum[i], others[i]);
  }
  if (places.writes_maxima) *places.own_maxima = make_float2(maximum[0], maximum[1]);
  warpgroup_sync();  // all warps' maxima are written; hazard: the first warp has read the page before's exponentials
#pragma unroll
  for (u32 i = 0; i < 2; ++i) maximum[i] = state.maximum[i];
#pragma unroll
  for (u32 w = 0; w < 4; ++w) {
    const float2 of_warp = places.all_maxima[w * (kSwappedHeads / 2)];
    maximum[0] = fmaxf(maximum[0], of_warp.x);
    maximum[1] = fmaxf(maximum[1], of_warp.y);
  }
#pragma unroll
  for (u32 i = 0; i < 2; ++i) {
    maximum[i] = raised_maximum(state.maximum[i], maximum[i], scale);
    const f32 anchor = softmax_anchor(maximum[i]);
    const f32 offset = -__fmul_rn(anchor, scale);
    factors[i] = exp2_scaled_difference(state.maximum[i], anchor, scale);
    state.maximum[i] = maximum[i];
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      f32& score = scores[half * 2 + i];
      score = exp2_approx(__fmaf_rn(score, scale, offset));
      places.exponentials[i * kExponentialStride + half * 8] = score;
    }
  }
  const u32 slot = page % 2u * kNarrowQueryBytes;
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    const u32 words = pack_bf16x2(scores[half * 2], scores[half * 2 + 1]);
#pragma unroll
    for (u32 i = 0; i < 2; ++i) *reinterpret_cast<u16*>(places.weights[half][i] + slot) = static_cast<u16>(words >> (16 * i));
  }
  fence_proxy_async_shared();  // written by ordinary stores, read by wgmma
  warpgroup_sync();            // the weights are whole before any warp's wgmma reads them, and the exponentials before the first warp adds them up
}

// The first warp, after weigh_swapped(): its exponentials into the sums, in the order of softmax_block().
BK_INLINE void add_exponentials(const u8* tile, SwappedSoftmax& state, const f32 (&factors)[2]) {
  const u32 lane = thread_idx() % 32u;
  const f32* row = reinterpret_cast<const f32*>(tile + kExponentialsOffset) + lane / 4u * kExponentialStride + lane % 4u * 2u;
  f32 sum = 0.0f;
#pragma unroll
  for (u32 i = 0; i < kPageTokens / 8; ++i) {
    const float2 pair = *reinterpret_cast<const float2*>(row + i * 8);
    sum = __fadd_rn(sum, __fadd_rn(pair.x, pair.y));
  }
  state.sum = __fmaf_rn(state.sum, of_quads_head(factors), sum);
}

// As store_part(). sum: first warp, of head lane / 4.
template <int kHeadDim>
BK_INLINE void store_swapped_part(const EngineParams& params, u32 item_idx, const f32 (&outputs)[kHeadDim / 64][4], const f32 (&maximum)[2], f32 sum) {
  const u32 thread = thread_idx() % kWarpgroupThreads;
  const u32 lane = thread % 32u;
  const u32 group = group_of(params);
#pragma unroll
  for (u32 i = 0; i < 2; ++i) {
    const u32 head = lane % 4u * 2u + i;
    if (head >= group) continue;
    f32* values = part_outputs<kHeadDim>(params, item_idx, head) + thread / 32u * 16u + lane / 4u;
#pragma unroll
    for (u32 block = 0; block < kHeadDim / 64; ++block) {
      values[block * 64] = outputs[block][i];
      values[block * 64 + 8] = outputs[block][2 + i];
    }
  }
  if (uniform(thread >= 32)) return;
  const f32 of_head = of_quads_head(maximum);
  if (lane % 4u == 0 && lane / 4u < group) *part_softmax<kHeadDim>(params, item_idx, lane / 4u) = make_float2(of_head, sum);
}

// The rows of a unit that is done. sum: first warp, of head lane / 4.
template <int kHeadDim, class Store>
BK_INLINE void store_swapped_rows(const AttentionRun& run, u8* tile, const f32 (&totals)[kHeadDim / 64][4], f32 sum, const Store& store) {
  const u32 thread = thread_idx() % kWarpgroupThreads;
  const u32 lane = thread % 32u;
  f32* const outputs = reinterpret_cast<f32*>(tile + kSwappedOutputsOffset<kHeadDim>);
  f32* const inverses = reinterpret_cast<f32*>(tile + kInversesOffset);
  static_assert(kHeadDim > 64 ? kSwappedOutputsOffset<kHeadDim> + kSwappedHeads * kHeadDim * 4 <= kQueryTileBytes<kHeadDim> : kSwappedHeads * kHeadDim * 4 <= kMaximaOffset - kExponentialsOffset,
                "the outputs in their place");
  if (kHeadDim <= 64) warpgroup_sync();  // hazard: the first warp still reads exponentials
  if (uniform(thread < 32) && lane % 4u == 0) inverses[lane / 4u] = __frcp_rn(sum);
#pragma unroll
  for (u32 block = 0; block < kHeadDim / 64; ++block) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) outputs[(lane % 4u * 2u + i % 2) * kHeadDim + block * 64 + thread / 32u * 16u + lane / 4u + i / 2 * 8] = totals[block][i];
  }
  warpgroup_sync();  // outputs and sums of all warps are there
  constexpr u32 kChunks = kHeadDim / 8;
  const u32 head = thread / kChunks;
  if (head >= run.num_packed) return;
  const float4* values = reinterpret_cast<const float4*>(outputs + head * kHeadDim + thread % kChunks * 8);
  const float4 low = values[0];
  const float4 high = values[1];
  const f32 inverse = inverses[head];
  const auto pair = [&](f32 first, f32 second) { return pack_bf16x2(finish_value(first, inverse), finish_value(second, inverse)); };
  store.chunk(run.row_begin, (run.kv_head * run.group + head) * kHeadDim + thread % kChunks * 8u, uint4{pair(low.x, low.y), pair(low.z, low.w), pair(high.x, high.y), pair(high.z, high.w)});
}

// scores = 64 keys x 8 heads. Addresses: uniform().
template <int kHeadDim>
BK_INLINE void issue_swapped_scores(f32 (&scores)[4], u32 queries, u32 keys) {
  const u64 a = wgmma_tile_descriptor(keys, kKvBlockBytes);
  const u64 b = wgmma_tile_descriptor(queries, kKvBlockBytes);
#pragma unroll
  for (u32 step = 0; step < kHeadDim / 16; ++step) {
    const u32 offset = step / 4 * (kKvBlockBytes >> 4) + step % 4 * 2;
    wgmma_m64_k16<kSwappedHeads>(scores, a + offset, b + offset, step != 0);
  }
}

// outputs (+)= 64 dimensions x 8 heads, block by block. Addresses: uniform().
template <int kHeadDim>
BK_INLINE void issue_swapped_outputs(f32 (&outputs)[kHeadDim / 64][4], u32 weights, u32 values, bool accumulate) {
  const u64 a = wgmma_tile_descriptor(values, kKvBlockBytes);
  const u64 b = wgmma_tile_descriptor(weights, kKvBlockBytes);
#pragma unroll
  for (u32 step = 0; step < kPageTokens / 16; ++step) {
#pragma unroll
    for (u32 block = 0; block < kHeadDim / 64; ++block) {
      wgmma_columns_k16<kSwappedHeads>(outputs[block], a + block * (kKvBlockBytes >> 4) + step * (16 * kKvBlockDims * 2 >> 4), b + step * 2, step != 0 || accumulate);
    }
  }
}

// compute_run() of a narrow run whose group has at most kSwappedHeads heads.
template <int kHeadDim, class Store>
BK_INLINE void compute_narrow_run(const EngineParams& params, const AttentionRun& run, u8* shared_memory, WorkerShared& shared, RingCursor& keys, u32& others, const Store& store) {
  const f32 scale = params.dims.attention_scale * 1.4426950408889634f;  // exponentials are powers of 2
  const u32 memory = shared_address(shared_memory);
  constexpr u32 kValuesOffset = kPageStages<kHeadDim> == 2 ? 0 : kKvTileBytes<kHeadDim>;
  constexpr u32 kBlocks = kHeadDim / 64;
  const bool adds = uniform(thread_idx() % kWarpgroupThreads < 32);
  const u32 tile_offset = kScratchOffset + uniform(compute_warpgroup()) * kQueryTileBytes<kHeadDim>;
  u8* const tile = shared_memory + tile_offset;

  f32 outputs[kBlocks][4];
  f32 totals[kBlocks][4];
  f32 scores[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (u32 block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) outputs[block][i] = totals[block][i] = 0.0f;
  }
  const SwappedPlaces places(tile);
  const u32 first_head = thread_idx() % 4u * 2u;
  const f32 first_maximum[2] = {first_head < run.group ? minus_infinite_score() : kNobodysMaximum, first_head + 1 < run.group ? minus_infinite_score() : kNobodysMaximum};
  SwappedSoftmax softmax;
  softmax.reset(first_maximum);
  SwappedSoftmax total = softmax;
  const u32 num_arrivals = is_elected() ? 2 : 0;  // a narrow page has one reader
  const auto wait_page = [&](u32 page, bool is_plain) {
    wait_stage(params, shared, keys);
    if (!is_plain && uniform(page == run.patch_page)) {
      patch_page<kHeadDim>(run, shared_memory + kScratchOffset, shared_memory + kRingOffset + keys.stage * kWeightStageBytes,
                           shared_memory + kRingOffset + values_of<kHeadDim>(keys).stage * kWeightStageBytes + kValuesOffset);
    }
  };
  const auto release_stage = [&](u32 stage) { mbarrier_arrive_count(&shared.weights_empty[stage], num_arrivals); };
  const auto stage_address = [&](u32 stage) { return uniform(memory + stage * kWeightStageBytes) + kRingOffset; };
  const auto weigh = [&](u32 page, bool is_plain, f32 (&factors)[2]) {
    if (!is_plain && uniform(page >= run.mask_from || page < run.mask_until)) {
      const u32 first_key = first_visible_key(run.position_begin, run.window);
#pragma unroll
      for (u32 half = 0; half < 2; ++half) {
        const u32 key = page * kPageTokens + thread_idx() % kWarpgroupThreads / 32u * 16u + thread_idx() % 32u / 4u + half * 8;
        if (key < first_key || key > run.position_begin) scores[half * 2] = scores[half * 2 + 1] = minus_infinite_score();
      }
    }
    weigh_swapped(places, page, scores, scale, softmax, factors);
  };
  // The outputs of a split of maxima and sums `done`, whose last page is `page`, into the total.
  const auto end_split = [&](u32 page, const SwappedSoftmax& done) {
    const f32 sum = adds ? quad_total(done.sum) : 0.0f;
    if (uniform(run.first_split != 0)) {
      store_swapped_part<kHeadDim>(params, run.item_begin + run.first_split + page / kSplitPages - run.page_begin / kSplitPages, outputs, done.maximum, sum);
      return;
    }
    f32 of_total[2];
    f32 of_split[2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
      const f32 maximum = fmaxf(total.maximum[i], done.maximum[i]);
      const FoldFactors factors = fold_factors(total.maximum[i], done.maximum[i], maximum, scale);
      total.maximum[i] = maximum;
      of_total[i] = factors.total;
      of_split[i] = factors.split;
    }
#pragma unroll
    for (u32 block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (u32 i = 0; i < 4; ++i) totals[block][i] = fold_value(totals[block][i], outputs[block][i], FoldFactors{of_total[i % 2], of_split[i % 2]});
    }
    if (adds) {
      const FoldFactors factors{of_quads_head(of_total), of_quads_head(of_split)};
      total.sum = fold_value(total.sum, sum, factors);
    }
  };

  f32 factors[2] = {1.0f, 1.0f};
  u32 page = uniform(run.page_begin);
  const u32 last_page = uniform(run.page_end - 1);
  const u32 plain_begin = uniform(run.plain_begin);
  const u32 num_plain = uniform(run.num_plain);
  const u32 queries = uniform(memory + run.query_offset) + kScratchOffset;
  const u32 weights = uniform(memory + tile_offset) + kSwappedWeightsOffset;
  wait_page(page, false);
  wgmma_fence();
  issue_swapped_scores<kHeadDim>(scores, queries, stage_address(keys.stage));
  wgmma_commit();
  wgmma_wait<0>();
  settle(scores);
  if (kPageStages<kHeadDim> == 2) release_stage(keys.stage);
  weigh(page, false, factors);
#pragma unroll 1
  for (; page != last_page; page++) {
    const bool is_plain = uniform(page - plain_begin < num_plain) != 0;
    const u32 values_stage = values_of<kHeadDim>(keys).stage;
    next_page<kHeadDim>(keys, others);
    wait_page(page + 1, is_plain);
    // Scores of the next page, then outputs of this one, during which the scores become exponentials.
    wgmma_fence();
    issue_swapped_scores<kHeadDim>(scores, queries, stage_address(keys.stage));
    wgmma_commit();
    issue_swapped_outputs<kHeadDim>(outputs, uniform(weights + page % 2u * kNarrowQueryBytes), stage_address(values_stage) + kValuesOffset, page % kSplitPages != 0);
    wgmma_commit();
    if (adds) add_exponentials(tile, softmax, factors);  // of this page, beside the products
    wgmma_wait<1>();
    settle(scores);
    if (kPageStages<kHeadDim> == 2) release_stage(keys.stage);
    const bool ends_split = (page + 1) % kSplitPages == 0;
    const SwappedSoftmax done = softmax;
    if (ends_split) softmax.reset(first_maximum);
    weigh(page + 1, is_plain, factors);
    wgmma_wait<0>();
#pragma unroll
    for (u32 block = 0; block < kBlocks; ++block) settle(outputs[block]);
    release_stage(values_stage);
    if (ends_split) {
      end_split(page, done);
    } else {
#pragma unroll
      for (u32 block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) outputs[block][i] = __fmul_rn(outputs[block][i], factors[i % 2]);
      }
    }
  }
  const u32 values_stage = values_of<kHeadDim>(keys).stage;
  next_page<kHeadDim>(keys, others);
  wgmma_fence();
  issue_swapped_outputs<kHeadDim>(outputs, uniform(weights + page % 2u * kNarrowQueryBytes), stage_address(values_stage) + kValuesOffset, page % kSplitPages != 0);
  wgmma_commit();
  if (adds) add_exponentials(tile, softmax, factors);
  wgmma_wait<0>();
#pragma unroll
  for (u32 block = 0; block < kBlocks; ++block) settle(outputs[block]);
  release_stage(values_stage);
  end_split(page, softmax);

  const u32 num_run_splits = splits_between(run.page_begin, run.page_end);
  if (uniform(num_run_splits == run.num_splits)) {
    store_swapped_rows<kHeadDim>(run, tile, totals, total.sum, store);
    return;
  }
  if (uniform(run.first_split == 0)) store_swapped_part<kHeadDim>(params, run.item_begin, totals, total.maximum, total.sum);
  leave_unit<kHeadDim>(params, run, shared_memory, num_run_splits, store);
}

}  // namespace blinkimp
