// Body of the vector kernels. Included once by each vector_kernels_<isa>.cpp, which defines
//   BK_KERNEL_TARGET   the target attribute of the instruction set (may be empty)
//   BK_KERNEL_WIDTH    f32 per vector register: 4, 8 or 16
//   BK_KERNEL_ROWS, BK_KERNEL_COLUMNS   register tile of dot_block: rows of x (at most 4) by rows of weight
//   BK_KERNEL_SINGLE_COLUMNS            rows of weight against a single row of x
//   BK_KERNEL_NAME, BK_KERNEL_TABLE     name and symbol of the resulting table
// Everything is in an unnamed namespace and carries the target attribute, so no wider instruction leaks into shared inline functions.
// The arithmetic is GCC/Clang vector extensions: no intrinsics, the same source for every machine.
// Called through vector_kernels.h. Test: pytest tests/host/test_reference_ops.py
#include <emu/vector_kernels.h>

#define BK_KERNEL BK_KERNEL_TARGET __attribute__((noinline))
#define BK_UNROLL _Pragma("GCC unroll 16")  // of loops over registers: arrays that are indexed by a variable live in memory
#define BK_HELPER BK_KERNEL_TARGET __attribute__((always_inline)) inline

namespace blinkimp {
namespace {

constexpr int kWidth = BK_KERNEL_WIDTH;
constexpr int kParts = static_cast<int>(kNumLanes) / kWidth;  // registers that make 16 lanes
constexpr f32 kInfinity = __builtin_huge_valf();

typedef f32 Vec __attribute__((vector_size(kWidth * 4)));
typedef i32 VecI __attribute__((vector_size(kWidth * 4)));
typedef u32 VecU __attribute__((vector_size(kWidth * 4)));
typedef u16 VecH __attribute__((vector_size(kWidth * 2)));
// The same in memory, at any address.
typedef f32 VecMemory __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));
typedef u16 VecHMemory __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));

struct Lanes16 {
  Vec part[kParts];  // 16 values
};

BK_HELPER void clear(Lanes16& lanes) {
  BK_UNROLL
  for (int i = 0; i < kParts; ++i) lanes.part[i] = Vec{};
}

// Part by part, and never by memcpy: taking their address would keep them in memory instead of registers.
BK_HELPER void load(Lanes16& lanes, const f32* source) {
  BK_UNROLL
  for (int i = 0; i < kParts; ++i) lanes.part[i] = *reinterpret_cast<const VecMemory*>(source + i * kWidth);
}

BK_HELPER void load(Lanes16& lanes, const u16* source) {  // bf16
  BK_UNROLL
  for (int i = 0; i < kParts; ++i) {
    const VecH half = *reinterpret_cast<const VecHMemory*>(source + i * kWidth);
    lanes.part[i] = (Vec)(__builtin_convertvector(half, VecU) << 16);
  }
}

template <class T>
BK_HELPER void load_partial(Lanes16& lanes, const T* source, u32 num) {  // the rest is zero
  T values[kNumLanes] = {};
  __builtin_memcpy(values, source, num * sizeof(T));
  load(lanes, values);
}

BK_HELPER void store(f32* target, const Lanes16& lanes) {
  BK_UNROLL
  for (int i = 0; i < kParts; ++i) *reinterpret_cast<VecMemory*>(target + i * kWidth) = lanes.part[i];
}

BK_HELPER void multiply_add(Lanes16& sum, const Lanes16& a, const Lanes16& b) {
  BK_UNROLL
  for (int i = 0; i < kParts; ++i) sum.part[i] += a.part[i] * b.part[i];
}

// Fixed tree over 16 lanes: i + (i + 8), then 4, 2, 1.
BK_HELPER f32 sum_lanes(const Lanes16& lanes) {
  typedef f32 Vec4 __attribute__((vector_size(16)));
  f32 values[kNumLanes];
  store(values, lanes);
  Vec4 quad[4];
  __builtin_memcpy(quad, values, sizeof(quad));
  const Vec4 eight_low = quad[0] + quad[2], eight_high = quad[1] + quad[3];
  const Vec4 four = eight_low + eight_high;
  return (four[0] + four[2]) + (four[1] + four[3]);
}

constexpr int kPrefetchRows = 16;

// ---- Products ----------------------------------------------------------------------------------------------------
template <int ROWS, int COLUMNS, class T>
BK_HELPER void dot_tile(const DotBlock& block, const f32* x, const T* weight, f32* out) {
  Lanes16 sums[ROWS][COLUMNS];
  BK_UNROLL
  for (int r = 0; r < ROWS; ++r)
    BK_UNROLL
    for (int c = 0; c < COLUMNS; ++c) clear(sums[r][c]);
  u32 k = 0;
  for (; k + kNumLanes <= block.num_k; k += kNumLanes) {
    Lanes16 x_lanes[ROWS];
    BK_UNROLL
    for (int r = 0; r < ROWS; ++r) load(x_lanes[r], x + r * block.x_stride + k);
    BK_UNROLL
    for (int c = 0; c < COLUMNS; ++c) {
      Lanes16 weight_lanes;
      load(weight_lanes, weight + c * block.weight_stride + k);
      // Weights are read once, in order, but in short rows side by side: hardware prefetchers see it too late. Worth 1.5 to 2 times
      // on weights in L3 or memory (Zen 5). Past the end a prefetch does nothing.
      __builtin_prefetch(weight + (c + kPrefetchRows) * block.weight_stride + k);
      BK_UNROLL
      for (int r = 0; r < ROWS; ++r) multiply_add(sums[r][c], x_lanes[r], weight_lanes);
    }
  }
  if (k < block.num_k) {
    Lanes16 x_lanes[ROWS];
    BK_UNROLL
    for (int r = 0; r < ROWS; ++r) load_partial(x_lanes[r], x + r * block.x_stride + k, block.num_k - k);
    BK_UNROLL
    for (int c = 0; c < COLUMNS; ++c) {
      Lanes16 weight_lanes;
      load_partial(weight_lanes, weight + c * block.weight_stride + k, block.num_k - k);
      BK_UNROLL
      for (int r = 0; r < ROWS; ++r) multiply_add(sums[r][c], x_lanes[r], weight_lanes);
    }
  }
  BK_UNROLL
  for (int r = 0; r < ROWS; ++r)
    BK_UNROLL
    for (int c = 0; c < COLUMNS; ++c) out[r * block.out_stride + c] = sum_lanes(sums[r][c]);
}

// ROWS rows against the weight rows [first, end).
template <int ROWS, int COLUMNS, class T>
BK_HELPER void dot_rows(const DotBlock& block, u32 row, u32 first, u32 end) {
  const f32* x = block.x + row * block.x_stride;
  const T* weight = static_cast<const T*>(block.weight);
  f32* out = block.out + row * block.out_stride;
  u32 f = first;
  for (; f + COLUMNS <= end; f += COLUMNS) dot_tile<ROWS, COLUMNS>(block, x, weight + f * block.weight_stride, out + f);
  for (; f < end; ++f) dot_tile<ROWS, 1>(block, x, weight + f * block.weight_stride, out + f);
}

// All rows of x against all features; the weight rows of one pass stay in L1 while the rows of x go by.
template <class T>
BK_HELPER void dot_pass(const DotBlock& block, u32 first, u32 end) {
  constexpr u32 kRows = BK_KERNEL_ROWS, kColumns = BK_KERNEL_COLUMNS;
  u32 row = 0;
  for (; row + kRows <= block.num_rows; row += kRows) dot_rows<kRows, kColumns, T>(block, row, first, end);
  const u32 left = block.num_rows - row;
  if (kRows > 3 && left == 3) dot_rows<3, kColumns, T>(block, row, first, end);
  if (kRows > 2 && left == 2) dot_rows<2, kColumns, T>(block, row, first, end);
  if (left == 1) dot_rows<1, BK_KERNEL_SINGLE_COLUMNS, T>(block, row, first, end);
}

template <class T>
BK_KERNEL void dot_block_of(const DotBlock& block) {
  constexpr u32 kWeightCacheBytes = 16 * 1024;
  const u64 row_bytes = u64{block.num_k} * sizeof(T) + 1;
  const u32 step = BK_KERNEL_SINGLE_COLUMNS * static_cast<u32>(1 + kWeightCacheBytes / (BK_KERNEL_SINGLE_COLUMNS * row_bytes));
  for (u32 first = 0; first < block.num_features; first += step) {
    dot_pass<T>(block, first, block.num_features - first < step ? block.num_features : first + step);
  }
}

// bf16 weights that many rows share are widened once per pass instead of once per tile: the same numbers, so the same sums.
BK_KERNEL void dot_block_widened(const DotBlock& block) {
  constexpr u32 kWideElements = 8 * 1024;  // 32 KB: half to two thirds of an L1
  alignas(64) f32 wide[kWideElements];
  const u32 wide_stride = (block.num_k + kNumLanes - 1) / kNumLanes * kNumLanes;
  const u32 step = kWideElements / wide_stride / BK_KERNEL_COLUMNS * BK_KERNEL_COLUMNS;
  for (u32 first = 0; first < block.num_features; first += step) {
    const u32 num = block.num_features - first < step ? block.num_features - first : step;
    for (u32 f = 0; f < num; ++f) {
      const u16* weight = static_cast<const u16*>(block.weight) + (first + f) * block.weight_stride;
      Lanes16 lanes;
      u32 k = 0;
      for (; k + kNumLanes <= block.num_k; k += kNumLanes) {
        load(lanes, weight + k);
        __builtin_prefetch(weight + kPrefetchRows * block.weight_stride + k);
        store(wide + f * wide_stride + k, lanes);
      }
      if (k < block.num_k) {
        load_partial(lanes, weight + k, block.num_k - k);
        store(wide + f * wide_stride + k, lanes);
      }
    }
    dot_pass<f32>(DotBlock{block.x, block.x_stride, block.num_rows, kF32, wide, wide_stride, num, block.num_k, block.out + first,
                           block.out_stride}, 0, num);
  }
}

BK_KERNEL void dot_block(const DotBlock& block) {
  constexpr u32 kRowsWorthWidening = 4 * BK_KERNEL_ROWS, kLargestWidenedK = 1024 * 8 / BK_KERNEL_COLUMNS;
  if (block.weight_dtype == kF32) return dot_block_of<f32>(block);
  if (block.num_rows >= kRowsWorthWidening && block.num_k <= kLargestWidenedK) return dot_block_widened(block);
  dot_block_of<u16>(block);
}

// ---- Elementwise -------------------------------------------------------------------------------------------------
// e^x: 2^n * p(x - n ln 2), within 2 ulp; 0 below -87, clamped above 88.
BK_HELPER void exponential(Vec& x) {
  constexpr f32 kLog2OfE = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr f32 kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const VecI underflow = x < -87.0f;
  Vec clamped = underflow ? Vec{} - 87.0f : x;
  clamped = clamped > 88.0f ? Vec{} + 88.0f : clamped;
  const Vec shifted = clamped * kLog2OfE + kRounder;
  const Vec n = shifted - kRounder;
  const Vec r = (clamped - n * kLn2High) - n * kLn2Low;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecI exponent = __builtin_convertvector(n, VecI) << 23;
  const Vec result = (Vec)((VecI)p + exponent);
  x = underflow ? Vec{} : result;
}

BK_HELPER void round_bf16_lanes(Vec& x) {
  const VecU bits = (VecU)x;
  const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  const VecI is_nan = x != x;
  x = is_nan ? x : (Vec)rounded;
}

BK_KERNEL f32 sum_of_squares(const f32* values, u32 num_values) {
  Lanes16 sum, lanes;
  clear(sum);
  u32 i = 0;
  for (; i + kNumLanes <= num_values; i += kNumLanes) {
    load(lanes, values + i);
    multiply_add(sum, lanes, lanes);
  }
  if (i < num_values) {
    load_partial(lanes, values + i, num_values - i);
    multiply_add(sum, lanes, lanes);
  }
  return sum_lanes(sum);
}

BK_KERNEL void scale_by_gain(const f32* values, const f32* gain, u32 num_values, bool round_bf16, f32* out) {
  u32 i = 0;
  for (; i + kWidth <= num_values; i += kWidth) {
    Vec value, factor;
    __builtin_memcpy(&value, values + i, sizeof(value));
    __builtin_memcpy(&factor, gain + i, sizeof(factor));
    value *= factor;
    if (round_bf16) round_bf16_lanes(value);
    __builtin_memcpy(out + i, &value, sizeof(value));
  }
  for (; i < num_values; ++i) out[i] = round_bf16 ? round_to_bf16(values[i] * gain[i]) : values[i] * gain[i];
}

BK_KERNEL void gate_up(const f32* values, u32 num_outputs, f32 scale, bool round_bf16, f32* out) {
  constexpr u32 kGroup = 8;                                  // outputs per group of gate and up rows
  constexpr u32 kStep = kWidth < 8 ? kWidth : 8;             // a 16-wide register takes one group in its lower half
  for (u32 i = 0; i < num_outputs; i += kStep) {
    const f32* group = values + i / kGroup * 2 * kGroup + i % kGroup;
    Vec gate{}, up{};
    __builtin_memcpy(&gate, group, kStep * sizeof(f32));
    __builtin_memcpy(&up, group + kGroup, kStep * sizeof(f32));
    gate *= scale;
    up *= scale;
    Vec power = Vec{} - gate;
    exponential(power);
    Vec result = gate / (power + 1.0f) * up;
    if (round_bf16) round_bf16_lanes(result);
    __builtin_memcpy(out + i, &result, kStep * sizeof(f32));
  }
}

// ---- Attention ---------------------------------------------------------------------------------------------------
// outputs[q][0..16) += sum over keys of weights[q][key] * values[key][0..16), keys in rising order.
template <int QUERIES, bool WHOLE, class T>
BK_HELPER void add_weighted(const AttendPage& page, u32 query, u32 dim, u32 num_keys) {
  const u32 num = WHOLE ? kNumLanes : page.head_dim - dim;
  Lanes16 sums[QUERIES];
  BK_UNROLL
  for (int q = 0; q < QUERIES; ++q) {
    const f32* output = page.outputs + u64{query + q} * page.head_dim + dim;
    WHOLE ? load(sums[q], output) : load_partial(sums[q], output, num);
  }
  const f32* weights = page.scores + u64{query} * kPageTokens;
  const T* values = static_cast<const T*>(page.values) + dim;
  for (u32 key = 0; key < num_keys; ++key) {
    Lanes16 value;
    WHOLE ? load(value, values + u64{key} * page.head_dim) : load_partial(value, values + u64{key} * page.head_dim, num);
    BK_UNROLL
    for (int q = 0; q < QUERIES; ++q)
      BK_UNROLL
      for (int i = 0; i < kParts; ++i) sums[q].part[i] += value.part[i] * weights[q * kPageTokens + key];
  }
  BK_UNROLL
  for (int q = 0; q < QUERIES; ++q) {
    f32* output = page.outputs + u64{query + q} * page.head_dim + dim;
    if (WHOLE) {
      store(output, sums[q]);
    } else {
      f32 whole[kNumLanes];
      store(whole, sums[q]);
      __builtin_memcpy(output, whole, num * sizeof(f32));
    }
  }
}

template <int QUERIES, class T>
BK_HELPER void add_weighted_rows(const AttendPage& page, u32 query, u32 num_keys) {
  u32 dim = 0;
  for (; dim + kNumLanes <= page.head_dim; dim += kNumLanes) add_weighted<QUERIES, true, T>(page, query, dim, num_keys);
  if (dim < page.head_dim) add_weighted<QUERIES, false, T>(page, query, dim, num_keys);
}

template <class T>
BK_KERNEL void add_values(const AttendPage& page, u32 num_keys) {
  constexpr u32 kQueries = kParts == 1 ? 8 : 4;
  u32 query = 0;
  for (; query + kQueries <= page.num_queries; query += kQueries) add_weighted_rows<kQueries, T>(page, query, num_keys);
  for (; query < page.num_queries; ++query) add_weighted_rows<1, T>(page, query, num_keys);
}

// Turns one query's scores into weights, keeps its running maximum and sum, and rescales what it has summed so far.
BK_HELPER void softmax_step(const AttendPage& page, u32 query) {
  f32* scores = page.scores + u64{query} * kPageTokens;
  const u32 first = page.first_key[query], end = page.end_key[query];
  if (first >= end) {  // sees nothing of this page: weights of zero change neither sum nor output
    for (u32 key = 0; key < kPageTokens; ++key) scores[key] = 0.0f;
    return;
  }
  f32 maximum = page.maxima[query];
  for (u32 key = first; key < end; ++key) {
    scores[key] *= page.scale;
    maximum = scores[key] > maximum ? scores[key] : maximum;
  }
  for (u32 key = 0; key < first; ++key) scores[key] = -kInfinity;
  for (u32 key = end; key < kPageTokens; ++key) scores[key] = -kInfinity;
  Lanes16 sum;
  clear(sum);
  for (u32 key = 0; key < kPageTokens; key += kNumLanes) {
    Lanes16 weights;
    load(weights, scores + key);
    BK_UNROLL
    for (int i = 0; i < kParts; ++i) {
      weights.part[i] -= maximum;
      exponential(weights.part[i]);
      sum.part[i] += weights.part[i];
    }
    store(scores + key, weights);
  }
  Vec factor = Vec{} + (page.maxima[query] - maximum);
  exponential(factor);
  page.maxima[query] = maximum;
  page.sums[query] = page.sums[query] * factor[0] + sum_lanes(sum);
  f32* output = page.outputs + u64{query} * page.head_dim;
  for (u32 dim = 0; dim < page.head_dim; ++dim) output[dim] *= factor[0];
}

BK_KERNEL void attend_page(const AttendPage& page) {
  u32 num_keys = 0;  // keys beyond the last that any query sees may be unwritten memory
  for (u32 query = 0; query < page.num_queries; ++query) num_keys = page.end_key[query] > num_keys ? page.end_key[query] : num_keys;
  if (num_keys == 0) return;
  const u64 head_dim = page.head_dim;
  dot_block(DotBlock{page.queries, head_dim, page.num_queries, page.kv_dtype, page.keys, head_dim, num_keys, page.head_dim, page.scores,
                     kPageTokens});
  for (u32 query = 0; query < page.num_queries; ++query) softmax_step(page, query);
  page.kv_dtype == kBF16 ? add_values<u16>(page, num_keys) : add_values<f32>(page, num_keys);
}

}  // namespace

const VectorKernels BK_KERNEL_TABLE = {BK_KERNEL_NAME, dot_block, attend_page, sum_of_squares, scale_by_gain, gate_up};

}  // namespace blinkimp
