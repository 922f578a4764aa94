// The GEMM ops of device/portable (product and epilogue), as written for the GPU, on emulated warps. See simt.h.
// Test: pytest tests/host/test_portable_epilogues_simt.py
#include <portable/epilogues.cuh>

namespace {

using namespace blinkimp;

constexpr u32 kScratch = 96 * 1024;

struct Call {
  const EngineParams* params;
  const Op* op;
  const StepPlan* plan;
  const f32* row_scales;   // [num_rows] 1 / rms of every row
  const u16* input;        // bf16 [rows, in_features]
  const u32* input_rows;   // [num_rows], or null
  u32 num_rows;
  u32 num_ctas;
};

template <u32 TILE_ROWS, u32 ROWS, u32 TILES, class Epilogue>
void run_items(const Call& call, f32* row_scale, const Epilogue& epilogue) {
  const GemmArgs args{reinterpret_cast<const u8*>(call.op->weight), call.input, call.input_rows, call.num_rows, call.op->in_features / kSliceColumns,
                      call.op->num_tiles};
  for (u32 cta = 0; cta < call.num_ctas; ++cta) {
    simt::machine.run(kComputeThreads, kScratch, [&] {
      const auto prepare = [&](u32 row_begin, u32 num_rows) {
        for (u32 row = threadIdx.x; row < num_rows; row += kComputeThreads) row_scale[row] = call.row_scales[row_begin + row];
      };
      run_gemm_items<TILE_ROWS, ROWS, TILES, kScratch>(args, cta, call.num_ctas, simt::machine.shared_memory.data(), prepare, epilogue);
    });
  }
}

template <u32 TILE_ROWS, class Epilogue>
void run_op(const Call& call, f32* row_scale, const Epilogue& epilogue) {
  if (call.num_rows <= 16) run_items<TILE_ROWS, 16, 1>(call, row_scale, epilogue);
  else if (call.num_rows <= 64) run_items<TILE_ROWS, 64, 1>(call, row_scale, epilogue);
  else run_items<TILE_ROWS, 128, 128 / TILE_ROWS>(call, row_scale, epilogue);
}

template <u32 TILE_ROWS, u32 HEAD_DIM>
void run_qkv(const Call& call, f32* row_scale) {
  run_op<TILE_ROWS>(call, row_scale, QkvEpilogue<TILE_ROWS, HEAD_DIM>{*call.params, *call.op, call.plan, row_scale});
}

}  // namespace

// False: a shape that is not compiled.
extern "C" bool bk_op_simt(const Call* call, unsigned head_dim, unsigned seed) {
  f32 row_scale[kMaxItemRows];
  simt::machine.random.seed(seed);
  const u32 tile_rows = call->op->tile_rows;
  switch (call->op->kind) {
    case kOpQkv:
      if (tile_rows == 48 && head_dim == 64) run_qkv<48, 64>(*call, row_scale);
      else if (tile_rows == 48 && head_dim == 128) run_qkv<48, 128>(*call, row_scale);
      else if (tile_rows == 64 && head_dim == 64) run_qkv<64, 64>(*call, row_scale);
      else if (tile_rows == 128 && head_dim == 128) run_qkv<128, 128>(*call, row_scale);
      else return false;
      return true;
    case kOpProject:
      run_op<32>(*call, row_scale, ProjectEpilogue<32>{*call->params, *call->op});
      return tile_rows == 32;
    case kOpGateUp:
      if (tile_rows == 48) run_op<48>(*call, row_scale, GateUpEpilogue<48>{*call->params, *call->op, row_scale});
      else if (tile_rows == 112) run_op<112>(*call, row_scale, GateUpEpilogue<112>{*call->params, *call->op, row_scale});
      else return false;
      return true;
    case kOpLmHead:
      run_op<112>(*call, row_scale, LogitsEpilogue<112>{*call->params, *call->op, row_scale});
      return tile_rows == 112;
  }
  return false;
}
