// device/portable/gemm.cuh, as written for the GPU, on emulated warps: every CTA of a grid, each item shape. See simt.h.
// Test: pytest tests/host/test_portable_gemm_simt.py
#include <portable/gemm.cuh>

namespace {

using namespace blinkimp;

// The scratch of the smallest target (99 KB of shared memory) and of a large one: other stages, other places of the output tile.
constexpr u32 kSmallScratch = 96 * 1024;
constexpr u32 kLargeScratch = 224 * 1024;

template <u32 TILE_ROWS, u32 ROWS, u32 TILES, u32 SCRATCH_BYTES>
void run(const GemmArgs& args, u32 num_ctas, u32 num_columns, f32* product, u32* num_prepared) {
  for (u32 cta = 0; cta < num_ctas; ++cta) {
    simt::machine.run(kComputeThreads, SCRATCH_BYTES, [&] {
      const auto prepare = [&](u32 row_begin, u32) {
        if (threadIdx.x == 0) ++num_prepared[row_begin / ROWS];
      };
      const auto epilogue = [&](const OutputTile& tile) {
        const u32 width = tile.num_tiles * TILE_ROWS;
        for (u32 idx = threadIdx.x; idx < tile.num_rows * width; idx += kComputeThreads) {
          const u32 row = idx / width, column = tile.tile_begin * TILE_ROWS + idx % width;
          if (column < num_columns) product[static_cast<u64>(tile.row_begin + row) * num_columns + column] += tile.values[row * tile.stride + idx % width];
        }
      };
      run_gemm_items<TILE_ROWS, ROWS, TILES, SCRATCH_BYTES>(args, cta, num_ctas, simt::machine.shared_memory.data(), prepare, epilogue);
    });
  }
}

template <u32 TILE_ROWS, u32 SCRATCH_BYTES>
bool run_rows(const GemmArgs& args, u32 rows, u32 tiles, u32 num_ctas, u32 num_columns, f32* product, u32* num_prepared) {
  constexpr u32 kTogether = 128 / TILE_ROWS;
  if (rows == 16) run<TILE_ROWS, 16, 1, SCRATCH_BYTES>(args, num_ctas, num_columns, product, num_prepared);
  else if (rows == 64) run<TILE_ROWS, 64, 1, SCRATCH_BYTES>(args, num_ctas, num_columns, product, num_prepared);
  else if (rows == 128 && tiles == 1) run<TILE_ROWS, 128, 1, SCRATCH_BYTES>(args, num_ctas, num_columns, product, num_prepared);
  else if (rows == 128 && tiles == kTogether) run<TILE_ROWS, 128, kTogether, SCRATCH_BYTES>(args, num_ctas, num_columns, product, num_prepared);
  else return false;
  return true;
}

template <u32 SCRATCH_BYTES>
bool run_tile(const GemmArgs& args, u32 tile_rows, u32 rows, u32 tiles, u32 num_ctas, u32 num_columns, f32* product, u32* num_prepared) {
  switch (tile_rows) {
    case 32: return run_rows<32, SCRATCH_BYTES>(args, rows, tiles, num_ctas, num_columns, product, num_prepared);
    case 48: return run_rows<48, SCRATCH_BYTES>(args, rows, tiles, num_ctas, num_columns, product, num_prepared);
    case 64: return run_rows<64, SCRATCH_BYTES>(args, rows, tiles, num_ctas, num_columns, product, num_prepared);
    case 112: return run_rows<112, SCRATCH_BYTES>(args, rows, tiles, num_ctas, num_columns, product, num_prepared);
    case 128: return run_rows<128, SCRATCH_BYTES>(args, rows, tiles, num_ctas, num_columns, product, num_prepared);
  }
  return false;
}

}  // namespace

// product: [num_rows, num_columns], zeroed; each output is added once. num_prepared: calls of prepare() per row group.
// Returns the number of shared-memory bank conflicts of ldmatrix, or -1 for a shape that is not compiled.
extern "C" long long bk_gemm_simt(const blinkimp::GemmArgs* args, unsigned tile_rows, unsigned rows, unsigned tiles, unsigned is_large, unsigned num_ctas,
                                  unsigned num_columns, float* product, unsigned* num_prepared, unsigned seed) {
  simt::machine.num_bank_conflicts = 0;
  simt::machine.random.seed(seed);
  const bool ran = is_large ? run_tile<kLargeScratch>(*args, tile_rows, rows, tiles, num_ctas, num_columns, product, num_prepared)
                            : run_tile<kSmallScratch>(*args, tile_rows, rows, tiles, num_ctas, num_columns, product, num_prepared);
  return ran ? static_cast<long long>(simt::machine.num_bank_conflicts) : -1;
}
