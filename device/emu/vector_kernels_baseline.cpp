// The vector kernels for any machine (SSE2, NEON). Chosen by vector_kernels.cpp. Test: pytest tests/host/test_reference_ops.py
#define BK_KERNEL_TARGET
#define BK_KERNEL_WIDTH 4
#define BK_KERNEL_ROWS 2
#define BK_KERNEL_COLUMNS 1
#define BK_KERNEL_SINGLE_COLUMNS 2
#define BK_KERNEL_NAME "baseline"
#define BK_KERNEL_TABLE kBaselineKernels
#include <emu/vector_kernels_impl.h>
