// Constraint automata in device memory: where they are, what the intake accepts, how the sampling op walks them.
//
//   EngineParams.constraints     u8 [num_queue_pairs][num_constraint_slots][constraint_slot_bytes], the layout of ConstraintHeader in
//                                ring_abi.h; behind them u64 loaded_bytes [num_queue_pairs][num_constraint_slots]
//
// A slot belongs to the ingress of its queue pair, which can write anything into it at any time. So nothing in a slot is trusted: sizes are
// checked against what was loaded whenever they are used, classes and states against the sizes. A bad automaton hurts its own request.
// Called by device/intake.cuh, device/sample_request.cuh. Test: pytest tests/host/test_director_sampling.py
#pragma once
#include <ptx.cuh>

namespace blinkimp {

BK_INLINE u64 constraint_index(const EngineParams& params, u32 queue_pair_idx, u32 slot) {
  return u64{queue_pair_idx} * params.num_constraint_slots + slot;
}

// u8 [constraint_slot_bytes], intake writes, the sampling op reads
BK_INLINE u8* constraint_slot(const EngineParams& params, u32 queue_pair_idx, u32 slot) {
  return reinterpret_cast<u8*>(params.constraints) + constraint_index(params, queue_pair_idx, slot) * params.constraint_slot_bytes;
}

// Bytes that came in order from offset 0 on; intake writes, intake and the sampling op read
BK_INLINE u64* constraint_loaded_bytes(const EngineParams& params, u32 queue_pair_idx, u32 slot) {
  return reinterpret_cast<u64*>(constraint_slot(params, params.num_queue_pairs, 0)) + constraint_index(params, queue_pair_idx, slot);
}

struct Constraint {           // an automaton whose sizes are good; num_states 0: there is none
  const u16* class_of_token;  // [vocab], not trusted
  const u16* next_state;      // [num_states][num_classes], not trusted
  u32 num_states;
  u32 num_classes;
};

// The automaton in a slot (slot + 1 as requests name it), if it is whole and for this vocabulary.
BK_INLINE Constraint open_constraint(const EngineParams& params, u32 queue_pair_idx, u32 slot_plus_1) {
  const Constraint none{nullptr, nullptr, 0, 0};
  if (slot_plus_1 == 0 || slot_plus_1 > params.num_constraint_slots) return none;
  const u8* slot = constraint_slot(params, queue_pair_idx, slot_plus_1 - 1);
  const u64 loaded_bytes = *constraint_loaded_bytes(params, queue_pair_idx, slot_plus_1 - 1);
  if (loaded_bytes < sizeof(ConstraintHeader) || loaded_bytes > params.constraint_slot_bytes) return none;
  const ConstraintHeader header = *reinterpret_cast<const ConstraintHeader*>(slot);  // once: it may change
  const u64 class_bytes = (u64{header.vocab_size} * sizeof(u16) + 3) / 4 * 4;
  const u64 state_bytes = u64{header.num_states} * header.num_classes * sizeof(u16);
  if (header.total_bytes != loaded_bytes || header.vocab_size != params.dims.vocab || header.num_states < 1 ||
      header.num_states > kNoState || header.num_classes < 1 || header.num_classes > 0x10000 ||
      sizeof(ConstraintHeader) + class_bytes + state_bytes != loaded_bytes)
    return none;
  const u8* tables = slot + sizeof(ConstraintHeader);
  return Constraint{reinterpret_cast<const u16*>(tables), reinterpret_cast<const u16*>(tables + class_bytes), header.num_states,
                    header.num_classes};
}

// The state behind `token`, or kNoState.
BK_INLINE u32 next_constraint_state(const Constraint& constraint, u32 state, u32 token) {
  if (state >= constraint.num_states) return kNoState;
  const u32 token_class = constraint.class_of_token[token];
  if (token_class >= constraint.num_classes) return kNoState;
  const u32 next = constraint.next_state[u64{state} * constraint.num_classes + token_class];
  return next < constraint.num_states ? next : kNoState;
}

}  // namespace blinkimp
