// Chooses the vector kernels for this machine. Called by the CPU interpreter. Test: pytest tests/host/test_reference_ops.py
#include <string.h>

#include <emu/vector_kernels.h>

namespace blinkimp {
namespace {

const VectorKernels* best_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512) return &kAvx512Kernels;
  if (has_avx2) return &kAvx2Kernels;
#endif
  return &kBaselineKernels;
}

const VectorKernels* selected = nullptr;  // set by select_vector_kernels(), before any thread runs a program

}  // namespace

const VectorKernels& vector_kernels() {
  static const VectorKernels* const best = best_kernels();
  return selected != nullptr ? *selected : *best;
}

bool select_vector_kernels(const char* name) {
  const VectorKernels* best = best_kernels();
  selected = nullptr;
  if (strcmp(name, "auto") == 0) return true;
  if (strcmp(name, "baseline") == 0) selected = &kBaselineKernels;
#if defined(__x86_64__)
  if (strcmp(name, "avx2") == 0 && best != &kBaselineKernels) selected = &kAvx2Kernels;
  if (strcmp(name, "avx512") == 0 && best == &kAvx512Kernels) selected = &kAvx512Kernels;
#endif
  return selected != nullptr;
}

}  // namespace blinkimp
