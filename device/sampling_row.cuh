// A row of logits as sampling passes over it: eight logits a lane at a time, the model's and those to choose by.
//
// A weight is a chain of some fifty dependent instructions, and an SM has two warps a scheduler in the sample op: eight chains must run side
// by side. So a pass works on two quads at once, computes all it needs of their eight logits, and has its side effects after that. What
// lies outside of the row is minus infinity, which weighs nothing and is chosen by nobody: no branch asks for each logit.
// Called by device/sampling*.cuh, device/sample_op.cuh. Test: pytest tests/host/test_sampling.py tests/host/test_sampling_edits.py
#pragma once
#include <logit_edits.cuh>
#if BK_GPU
#include <ptx_mma.cuh>
#endif

#if BK_GPU
#define BK_UNROLL _Pragma("unroll")
#define BK_NO_UNROLL _Pragma("unroll 1")
#else
#define BK_UNROLL
#define BK_NO_UNROLL
#endif

namespace blinkimp::sampling {

struct LogitQuad {
  f32 values[4];  // logits of four neighbouring ids
};

// Four logits from `offset` on, those below num_logits; an offset that wrapped below zero has none before 0. The others are -inf.
BK_INLINE LogitQuad load_quad(const f32* logits, u32 num_logits, u32 offset) {
  LogitQuad quad{{minus_infinity(), minus_infinity(), minus_infinity(), minus_infinity()}};
  if (offset < num_logits && num_logits - offset >= 4u) {
#if BK_GPU
    const float4 loaded = *reinterpret_cast<const float4*>(logits + offset);
    quad = LogitQuad{{loaded.x, loaded.y, loaded.z, loaded.w}};
#else
    __builtin_memcpy(&quad, logits + offset, sizeof(quad));
#endif
  } else {
    BK_UNROLL
    for (u32 i = 0; i < 4; ++i) {
      if (offset + i < num_logits) quad.values[i] = logits[offset + i];
    }
  }
  return quad;
}

// Logits of a row's first aligned quad that lie before the row.
BK_INLINE u32 num_lead_of(const f32* logits) { return (static_cast<u32>(reinterpret_cast<u64>(logits)) / sizeof(f32)) % 4u; }

// fn(quad_idx of two quads, load(quad_idx) of both) for quads start, start + stride, ... below num_quads; the last second one may lie beyond,
// and load must know that.
template <class Load, class Fn>
BK_INLINE void for_each_two_quads(u32 num_quads, u32 start, u32 stride, Load load, Fn fn) {
#if BK_GPU
  start = opaque(start);  // or the bounds of its first quads, predicates, live through all passes over the row
  // Four loads on their way while two quads are worked on: 256 threads alone would leave most of the memory's bandwidth unused.
  auto next0 = load(start);
  auto next1 = load(start + stride);
  auto next2 = load(start + 2 * stride);
  auto next3 = load(start + 3 * stride);
  for (u32 quad_idx = start; quad_idx < num_quads; quad_idx += 2 * stride) {
    const auto first = next0;
    const auto second = next1;
    next0 = next2;
    next1 = next3;
    next2 = load(quad_idx + 4 * stride);
    next3 = load(quad_idx + 5 * stride);
    fn(quad_idx, first, quad_idx + stride, second);
  }
#else
  for (u32 quad_idx = start; quad_idx < num_quads; quad_idx += 2 * stride) {
    fn(quad_idx, load(quad_idx), quad_idx + stride, load(quad_idx + stride));
  }
#endif
}

// fn(eight logits) over [0, num_logits), by aligned 16-byte loads where four lie inside. For what needs no ids.
template <class Fn>
BK_INLINE void for_each_eight(const f32* logits, u32 num_logits, u32 start, u32 stride, Fn fn) {
  const u32 num_lead = num_lead_of(logits);
  for_each_two_quads((num_lead + num_logits + 3u) / 4u, start, stride,
                     [&](u32 quad_idx) { return load_quad(logits, num_logits, quad_idx * 4u - num_lead); },
                     [&](u32, const LogitQuad& first, u32, const LogitQuad& second) {
                       f32 values[8];
                       BK_UNROLL
                       for (u32 i = 0; i < 4; ++i) {
                         values[i] = first.values[i];
                         values[4 + i] = second.values[i];
                       }
                       fn(values);
                     });
}

constexpr u32 kBatch = 8;

// values[i], values[i] = value. The values stay in registers: on the GPU these are selections.
template <class T, u32 N>
BK_INLINE T pick(const T (&values)[N], u32 i) {
#if BK_GPU
  T value = values[0];
  BK_UNROLL
  for (u32 k = 1; k < N; ++k) value = k == i ? values[k] : value;
  return value;
#else
  return values[i];
#endif
}
template <class T, u32 N>
BK_INLINE void put(T (&values)[N], u32 i, T value) {
#if BK_GPU
  BK_UNROLL
  for (u32 k = 0; k < N; ++k) values[k] = k == i ? value : values[k];
#else
  values[i] = value;
#endif
}

struct RowBatch {      // two quads of a row; ids outside of it have -inf in both
  u32 offsets[2];      // ids of the quads' first
  f32 model[kBatch];   // orderable logits of the model
  f32 chosen[kBatch];  // those to choose by: after the edits

  BK_INLINE u32 idx(u32 i) const { return (i < 4u ? offsets[0] : offsets[1]) + i % 4u; }
};

struct RowQuad {     // as loaded
  LogitQuad logits;
  u32 seen[2];       // the penalties' counts, two a word; 0 without penalties
};

// One row as the passes see it.
struct Row {
  const f32* logits;        // [vocab], the model's
  u32 vocab;
  bool is_edited;
  const u16* counts;        // [vocab] of the penalties, its first of 8-byte alignment; or null
  EditScratch* scratch;     // of prepare_edits(); valid if is_edited

  BK_INLINE RowQuad load(u32 offset) const {
    RowQuad quad{load_quad(logits, vocab, offset), {0, 0}};
    if (counts == nullptr) return quad;
    if (offset % 4u == 0 && offset < vocab && vocab - offset >= 4u) {
#if BK_GPU
      const uint2 loaded = *reinterpret_cast<const uint2*>(counts + offset);
      quad.seen[0] = loaded.x;
      quad.seen[1] = loaded.y;
#else
      __builtin_memcpy(quad.seen, counts + offset, sizeof(quad.seen));
#endif
    } else {
      BK_UNROLL
      for (u32 i = 0; i < 4; ++i) {
        if (offset + i < vocab) quad.seen[i / 2u] |= u32{counts[offset + i]} << (16u * (i % 2u));
      }
    }
    return quad;
  }

  BK_INLINE u32 num_quads() const { return (num_lead_of(logits) + vocab + 3u) / 4u; }

  // fn(RowBatch), ids rising from call to call and in each.
  template <class Group, class Fn>
  BK_INLINE void for_each_batch(const Group& group, Fn fn) const {
    const u32 num_lead = num_lead_of(logits);
    for_each_two_quads(num_quads(), group.id, group.count, [&](u32 quad_idx) { return load(quad_idx * 4u - num_lead); },
                       [&](u32 first_idx, const RowQuad& first, u32 second_idx, const RowQuad& second) {
                         RowBatch batch;
                         batch.offsets[0] = first_idx * 4u - num_lead;
                         batch.offsets[1] = second_idx * 4u - num_lead;
                         BK_UNROLL
                         for (u32 i = 0; i < 4; ++i) {
                           batch.model[i] = orderable_logit(first.logits.values[i]);
                           batch.model[4 + i] = orderable_logit(second.logits.values[i]);
                         }
                         BK_UNROLL
                         for (u32 i = 0; i < kBatch; ++i) batch.chosen[i] = batch.model[i];
                         if (is_edited) {
                           const u32 seen[4] = {first.seen[0], first.seen[1], second.seen[0], second.seen[1]};
                           edit(seen, &batch);
                         }
                         fn(batch);
                       });
  }

  // fn(idx, logit of the model, logit to choose by), for what is seldom done: one copy of fn's code.
  template <class Group, class Fn>
  BK_INLINE void for_each(const Group& group, Fn fn) const {
    for_each_batch(group, [&](const RowBatch& batch) {
      BK_NO_UNROLL
      for (u32 i = 0; i < kBatch; ++i) {
        if (batch.idx(i) < vocab) fn(batch.idx(i), pick(batch.model, i), pick(batch.chosen, i));
      }
    });
  }

  // edited_logit() of all eight. What few ids have is done in loops: written out eight times it would be most of the code.
  BK_INLINE void edit(const u32 (&seen)[4], RowBatch* batch) const {
    if (scratch->edits.num_sparse() != 0) add_biases(batch);
    u32 are_seen = 0;  // bit i: logit i
    BK_UNROLL
    for (u32 i = 0; i < kBatch; ++i) are_seen |= (seen[i / 2u] & (i % 2u == 0 ? 0xffffu : 0xffff0000u)) != 0 ? 1u << i : 0u;
    BK_NO_UNROLL
    for (; are_seen != 0; are_seen &= are_seen - 1) {
      const u32 i = lowest_bit_u32(are_seen);
      const u32 count = (pick(seen, i / 2u) >> (16u * (i % 2u))) & 0xffffu;
      put(batch->chosen, i, penalised_logit(scratch->edits, count, pick(batch->chosen, i)));
    }
    if (scratch->edits.class_of_token != nullptr) forbid(batch);
    BK_UNROLL
    for (u32 i = 0; i < kBatch; ++i) batch->chosen[i] = orderable_logit(batch->chosen[i]);
  }

  BK_INLINE void add_biases(RowBatch* batch) const {
    u32 heads = kNoEdit;  // of all buckets that the ids are in: two a quad at most
    BK_UNROLL
    for (u32 i = 0; i < 4; ++i) heads &= scratch->first[edit_bucket(batch->offsets[i / 2u] + i % 2u * 3u)];
    if (heads == kNoEdit) return;
    BK_NO_UNROLL
    for (u32 i = 0; i < 4; ++i) {
      const u32 offset = i < 2u ? batch->offsets[0] : batch->offsets[1];
      const u32 bucket = edit_bucket(offset + i % 2u * 3u);
      if (i % 2u != 0 && bucket == edit_bucket(offset)) continue;  // seen already
      for (u32 entry_idx = scratch->first[bucket]; entry_idx != kNoEdit; entry_idx = scratch->next[entry_idx]) {
        const LogitBias entry = scratch->entries[entry_idx];
        const u32 place = i / 2u * 4u + (entry.token - offset);
        if (entry.token - offset < 4u) put(batch->chosen, place, pick(batch->chosen, place) + entry.bias);
      }
    }
  }

  BK_INLINE void forbid(RowBatch* batch) const {
    u32 classes[kBatch];  // loaded together, then their states: neither table is in a cache nearby
    BK_UNROLL
    for (u32 i = 0; i < kBatch; ++i) {
      const bool has_class = scratch->edits.num_classes != 0 && batch->idx(i) < vocab;
      classes[i] = has_class ? scratch->edits.class_of_token[batch->idx(i)] : scratch->edits.num_classes;
    }
    BK_UNROLL
    for (u32 i = 0; i < kBatch; ++i) {
      const u32 state = classes[i] < scratch->edits.num_classes ? scratch->edits.next_state[classes[i]] : scratch->edits.num_states;
      if (state >= scratch->edits.num_states) batch->chosen[i] = minus_infinity();
    }
  }
};

}  // namespace blinkimp::sampling
