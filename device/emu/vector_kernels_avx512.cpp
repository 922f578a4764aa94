// The vector kernels for AVX-512 (32 registers of 16 f32). Chosen by vector_kernels.cpp. Test: pytest tests/host/test_reference_ops.py
#if defined(__x86_64__)
#define BK_KERNEL_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define BK_KERNEL_WIDTH 16
#define BK_KERNEL_ROWS 4
#define BK_KERNEL_COLUMNS 4
#define BK_KERNEL_SINGLE_COLUMNS 8
#define BK_KERNEL_NAME "avx512"
#define BK_KERNEL_TABLE kAvx512Kernels
#include <emu/vector_kernels_impl.h>
#endif
