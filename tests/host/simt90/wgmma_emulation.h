// wgmma m64nNk16 of one warpgroup on the CPU: operands by descriptor from shared memory, A optionally from registers; fp32 sums.
//
// Layouts after the PTX ISA: K-major and MN-major operands with the 128-byte swizzle (address bits 4-6 ^= bits 7-9), A and D fragments.
// Included by tests/host/simt90/ptx_sm90.cuh. Test: pytest tests/host/test_attention_sm90_simt.py
#pragma once

namespace simt90 {

inline f32 element_at(u32 address) {
  address ^= (address >> 7 & 7) << 4;
  if (address + 2 > sizeof(blinkimp::dynamic_shared)) simt::fail("wgmma operand beyond shared memory", address, 0);
  blinkimp::u16 bits;
  std::memcpy(&bits, blinkimp::dynamic_shared + address, 2);
  return __builtin_bit_cast(f32, static_cast<u32>(bits) << 16);
}

struct Operand {
  u32 start, leading, stride;
  explicit Operand(u64 descriptor)
      : start(static_cast<u32>(descriptor & 0x3FFF) << 4), leading(static_cast<u32>(descriptor >> 16 & 0x3FFF) << 4), stride(static_cast<u32>(descriptor >> 32 & 0x3FFF) << 4) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) simt::fail("wgmma descriptor's swizzle and base offset", descriptor >> 49, 1u << 13);
  }
  f32 k_major(u32 row, u32 k) const { return element_at(start + row / 8 * stride + row % 8 * 128 + k * 2); }
  f32 mn_major(u32 k, u32 n) const { return element_at(start + n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2); }
};

inline f32 half_of(u32 word, u32 i) { return __builtin_bit_cast(f32, (word >> (16 * i) & 0xffff) << 16); }

// One wgmma of threads first_thread .. + 127; ops: each thread's own record of it.
inline void run_one(u32 first_thread, const std::vector<Wgmma*>& ops) {
  const Wgmma& op = *ops[0];
  static f32 a[64][16], b[16][256];
  const Operand b_operand(op.b_descriptor);
  for (u32 k = 0; k < 16; ++k) {
    for (u32 n = 0; n < op.columns; ++n) b[k][n] = op.b_transposed ? b_operand.mn_major(k, n) : b_operand.k_major(n, k);
  }
  for (u32 thread = 0; thread < 128; ++thread) {
    const Wgmma& own = *ops[thread];
    if (own.b_descriptor != op.b_descriptor || own.a_descriptor != op.a_descriptor || own.columns != op.columns || own.accumulate != op.accumulate || !own.a != !op.a) {
      simt::fail("threads of a warpgroup disagree about a wgmma; thread", first_thread + thread, first_thread);
    }
    if (own.a) {
      const u32 row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
      for (u32 i = 0; i < 8; ++i) a[row + i / 2 % 2 * 8][column + i % 2 + i / 4 * 8] = half_of(own.a[i / 2], i % 2);
    }
  }
  if (!op.a) {
    const Operand a_operand(op.a_descriptor);
    for (u32 row = 0; row < 64; ++row) {
      for (u32 k = 0; k < 16; ++k) a[row][k] = op.a_transposed ? a_operand.mn_major(k, row) : a_operand.k_major(row, k);
    }
  }
  static f32 sums[64][256];
  const auto each_output = [&](const auto& visit) {
    for (u32 thread = 0; thread < 128; ++thread) {
      for (u32 i = 0; i < op.columns / 2; ++i) visit(ops[thread]->d[i], sums[thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8][i / 4 * 8 + thread % 4 * 2 + i % 2]);
    }
  };
  for (u32 thread = 0; thread < 128; ++thread) {
    Wgmma& own = *ops[thread];
    if (!own.before.empty()) std::memcpy(own.d, own.before.data(), own.before.size() * sizeof(f32));
  }
  if (op.accumulate) each_output([](f32 d, f32& sum) { sum = d; });
  else std::memset(sums, 0, sizeof(sums));
  for (u32 row = 0; row < 64; ++row) {
    for (u32 k = 0; k < 16; ++k) {
      for (u32 n = 0; n < op.columns; ++n) sums[row][n] += a[row][k] * b[k][n];
    }
  }
  each_output([](f32& d, f32 sum) { d = sum; });
}

inline void issue(Wgmma op) {
  auto& groups = wgmmas[simt::machine.current];
  bool pending = false;
  for (const auto& group : groups) {
    for (const Wgmma& earlier : group) pending = pending || earlier.d == op.d;
  }
  if (!pending) {
    op.before.assign(op.d, op.d + op.columns / 2);
    for (u32 i = 0; i < op.columns / 2; ++i) op.d[i] = __builtin_nanf("");
  }
  groups.back().push_back(std::move(op));
}

// All 128 threads of the warpgroup: completes all committed groups but the last num_kept.
inline void run_wgmmas(u32 num_kept) {
  const u32 warpgroup = simt::machine.current / 128;
  const u32 first = warpgroup * 128;
  simt::Rendezvous& place = warpgroups[warpgroup];
  if (++place.num_arrived < 128) {
    simt::machine.wait(place);
    return;
  }
  place.num_arrived = 0;
  const size_t num_committed = wgmmas[first].size() - 1;
  for (u32 thread = first; thread < first + 128; ++thread) {
    if (wgmmas[thread].size() != num_committed + 1) simt::fail("wgmma groups that a thread committed, unlike its neighbours", wgmmas[thread].size() - 1, num_committed);
  }
  const size_t num_run = num_committed > num_kept ? num_committed - num_kept : 0;
  std::vector<Wgmma*> ops(128);
  for (size_t group = 0; group < num_run; ++group) {
    for (size_t i = 0; i < wgmmas[first][group].size(); ++i) {
      for (u32 thread = 0; thread < 128; ++thread) {
        if (wgmmas[first + thread][group].size() != wgmmas[first][group].size()) simt::fail("wgmmas in a thread's group, unlike its neighbours", thread, 0);
        ops[thread] = &wgmmas[first + thread][group][i];
      }
      run_one(first, ops);
    }
  }
  for (u32 thread = first; thread < first + 128; ++thread) wgmmas[thread].erase(wgmmas[thread].begin(), wgmmas[thread].begin() + static_cast<std::ptrdiff_t>(num_run));
  ++place.generation;
}

}  // namespace simt90
