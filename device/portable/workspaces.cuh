// The activations between the ops of the portable kernel: plain rows, no tiles (cp.async swizzles on the way in). GPU only.
//
// The slots of EngineParams.workspaces and their sizes are those of the Hopper kernel (host/gpu_memory.py allocates once for both); what
// stands in them is this kernel's own business. Used by device/portable/*.cuh. Test: pytest -m gpu tests/gpu/test_portable_gpu.py
#pragma once
#include <program_abi.h>

namespace blinkimp {

enum Workspace : u32 {
  kWsHidden = 0,         // f32 [rows, hidden]
  kWsNormed = 1,         // bf16 [rows, hidden]: hidden * gain of the next norm
  kWsQuery = 2,          // bf16 [rows, num_heads * head_dim], pairs of the rotation adjacent
  kWsAttention = 3,      // bf16 [rows, num_heads * head_dim]
  kWsActivation = 4,     // bf16 [rows, intermediate]
  kWsSquares = 5,        // f32 [rows, hidden / kNormGroup]: sums of squares of kNormGroup hidden columns
  kWsLogits = 6,         // f32 [max_batch, vocab]
  kWsAttentionPart = 9,  // attention's partial results
  kWsLogitBest = 10,     // u64 [max_batch, num_tiles of the LM head]: the best logit of each tile
};
constexpr u32 kNormGroup = 32;

}  // namespace blinkimp
