// The inner loops of the CPU interpreter, compiled once per instruction set; the machine's best one is chosen at start.
//
// The order of additions of each output is fixed: 16 lanes along the reduced axis, lane i adding elements i, i + 16, ... in turn,
// then a fixed tree over the lanes. Tiling, row count and thread count change which outputs are computed together, never the order.
// Called by reference_ops.cpp and reference_attention.cpp. Test: pytest tests/host/test_reference_ops.py
#pragma once
#include <program_abi.h>

namespace blinkimp {

constexpr u32 kNumLanes = 16;

struct DotBlock {         // out[r][f] = sum over k of x[r][k] * weight[f][k]
  const f32* x;           // [num_rows, x_stride]
  u64 x_stride;           // elements
  u32 num_rows;
  u32 weight_dtype;       // DType
  const void* weight;     // [num_features, weight_stride]
  u64 weight_stride;      // elements
  u32 num_features;
  u32 num_k;
  f32* out;               // [num_rows, out_stride]
  u64 out_stride;
};

struct AttendPage {       // one page of keys and values against the queries of one KV head
  const f32* queries;     // [num_queries, head_dim]
  const void* keys;       // [kPageTokens, head_dim] of kv_dtype
  const void* values;     // [kPageTokens, head_dim] of kv_dtype
  const u32* first_key;   // [num_queries] the query sees keys [first_key, end_key) of this page
  const u32* end_key;     // [num_queries]
  u32 num_queries;
  u32 head_dim;
  u32 kv_dtype;
  f32 scale;
  f32* scores;            // [num_queries, kPageTokens] scratch
  f32* maxima;            // [num_queries] running maximum, -infinity at first
  f32* sums;              // [num_queries] running sum of exponentials, 0 at first
  f32* outputs;           // [num_queries, head_dim] running weighted sum, 0 at first
};

struct VectorKernels {
  const char* name;  // of the instruction set
  void (*dot_block)(const DotBlock& block);
  void (*attend_page)(const AttendPage& page);
  f32 (*sum_of_squares)(const f32* values, u32 num_values);
  // out[i] = in[i] * gain[i], rounded to bf16 if asked
  void (*scale_by_gain)(const f32* values, const f32* gain, u32 num_values, bool round_bf16, f32* out);
  // values: groups of 8 gate, 8 up; out[i] = silu(gate * scale) * (up * scale), rounded to bf16 if asked
  void (*gate_up)(const f32* values, u32 num_outputs, f32 scale, bool round_bf16, f32* out);
};

extern const VectorKernels kBaselineKernels;
#if defined(__x86_64__)
extern const VectorKernels kAvx2Kernels;
extern const VectorKernels kAvx512Kernels;
#endif

const VectorKernels& vector_kernels();                 // in use
bool select_vector_kernels(const char* name);          // "auto" or a name; false: this machine cannot run it

// Nearest, ties to even; NaN stays NaN. The value of the bf16, as fp32.
inline f32 round_to_bf16(f32 value) {
  const u32 bits = __builtin_bit_cast(u32, value);
  if ((bits & 0x7fffffff) > 0x7f800000) return value;
  return __builtin_bit_cast(f32, (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000);
}

inline u16 bf16_bits(f32 value) {
  const u32 bits = __builtin_bit_cast(u32, value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<u16>((bits >> 16) | 0x40);
  return static_cast<u16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline f32 f32_of_bf16(u16 bits) { return __builtin_bit_cast(f32, static_cast<u32>(bits) << 16); }

}  // namespace blinkimp
