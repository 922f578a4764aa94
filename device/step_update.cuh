// What a host that schedules (orchestrator = cpu) sends to the device with a step: pieces of its tables, one batch of them at a time.
//
// The director then lives in the host and writes tables in host memory; the workers read tables of their own, of the same layout and at the
// same places. Batches lie in memory that both sides see: pinned and mapped for a GPU, shared with the emulated device's process.
// Written by emu/orchestrator_mirror.h; applied by step_kernel.cu (GPU) and emu/orchestrator_emulated.cpp.
// Test: pytest tests/host/test_cpu_orchestrator.py
#pragma once
#include <step_plan.cuh>

namespace blinkimp {

enum UpdateTable : u32 {
  kUpdatePlan = 0,         // EngineParams.plans[0]: every launch runs one step, from the first of the two plans
  kUpdateRequests = 1,     // and so on: the member of EngineParams by that name
  kUpdatePageTables = 2,
  kUpdateTokens = 3,
  kUpdateLogitBiases = 4,
  kUpdateConstraints = 5,
};

constexpr u32 kMaxPieces = 1024;
constexpr u32 kPieceWords = 1024;             // at most: what one block of step_kernel.cu copies
constexpr u32 kBatchWords = 240 * 1024;       // of all pieces of a batch

struct UpdatePiece {
  u64 table_offset;  // bytes, a multiple of 4
  u32 table;         // UpdateTable
  u32 num_words;     // 1 .. kPieceWords, u32 each
  u32 first_word;    // in UpdateBatch.words
  u32 reserved0;
};
ABI_SIZE(UpdatePiece, 24);

struct UpdateBatch {  // writer: the host, while no launch that was given it is on its way
  u32 num_pieces;
  u32 num_words;
  u32 reserved0[14];
  UpdatePiece pieces[kMaxPieces];  // the first num_pieces are valid
  u32 words[kBatchWords];          // the first num_words are valid
};

BK_INLINE u64 update_target(const EngineParams& params, const UpdatePiece& piece) {
  switch (piece.table) {
    case kUpdatePlan: return params.plans[0] + piece.table_offset;
    case kUpdateRequests: return params.requests + piece.table_offset;
    case kUpdatePageTables: return params.page_tables + piece.table_offset;
    case kUpdateTokens: return params.tokens + piece.table_offset;
    case kUpdateLogitBiases: return params.logit_biases + piece.table_offset;
    default: return params.constraints + piece.table_offset;
  }
}

// Thread `thread_idx` of num_threads that copy the piece together.
BK_INLINE void apply_piece(const EngineParams& params, const UpdateBatch& batch, u32 piece_idx, u32 thread_idx, u32 num_threads) {
  const UpdatePiece piece = batch.pieces[piece_idx];
  u32* __restrict__ target = reinterpret_cast<u32*>(update_target(params, piece));  // restrict: all loads at once
  const u32* __restrict__ source = batch.words + piece.first_word;
  for (u32 i = thread_idx; i < piece.num_words; i += num_threads) target[i] = source[i];
}

}  // namespace blinkimp
