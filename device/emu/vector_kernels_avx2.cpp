// The vector kernels for AVX2 with FMA (16 registers of 8 f32). Chosen by vector_kernels.cpp. Test: pytest tests/host/test_reference_ops.py
#if defined(__x86_64__)
#define BK_KERNEL_TARGET __attribute__((target("avx2,fma")))
#define BK_KERNEL_WIDTH 8
#define BK_KERNEL_ROWS 2
#define BK_KERNEL_COLUMNS 2
#define BK_KERNEL_SINGLE_COLUMNS 4
#define BK_KERNEL_NAME "avx2"
#define BK_KERNEL_TABLE kAvx2Kernels
#include <emu/vector_kernels_impl.h>
#endif
