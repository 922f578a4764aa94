// A grid of emulated Hopper CTAs that take turns: each goes on until all its threads wait, then the next.
//
// A CTA's state stands in the globals that the emulated PTX uses while the CTA runs, and in its slot otherwise; the order of the turns is
// shuffled. When no CTA can go on, one bulk copy that is under way anywhere lands.
// Used by tests/host/simt90/worker_sm90_simt.cpp. Test: pytest tests/host/test_worker_sm90_simt.py
#pragma once
#include <ptx_sm90.cuh>

namespace simt90 {

struct Cta {
  simt::Machine machine;
  std::map<u64*, Barrier> barriers;
  std::vector<Copy> copies;
  std::vector<std::vector<std::vector<Wgmma>>> wgmmas;
  simt::Rendezvous warpgroups[3];
  std::vector<u8> shared_memory = std::vector<u8>(sizeof(blinkimp::dynamic_shared), 0xff);  // NaN until written
};

inline std::vector<Cta> grid_ctas;

inline void swap_cta(u32 idx) {  // into the globals, and, called again, out of them
  Cta& cta = grid_ctas[idx];
  std::swap(simt::machine, cta.machine);
  std::swap(barriers, cta.barriers);
  std::swap(copies, cta.copies);
  std::swap(wgmmas, cta.wgmmas);
  std::swap(warpgroups, cta.warpgroups);
  std::swap_ranges(cta.shared_memory.begin(), cta.shared_memory.end(), blinkimp::dynamic_shared);
  cta_idx = idx;
}

// Runs `kernel` in num_ctas CTAs of num_threads threads. between: called after each round; true when it did something that threads wait for.
template <class Kernel, class Between>
inline void run_grid(u32 num_ctas, u32 num_threads, u32 seed, const Kernel& kernel, const Between& between) {
  grid_ctas.clear();
  grid_ctas.resize(num_ctas);
  std::mt19937 random(seed);
  std::vector<u32> order(num_ctas);
  for (u32 idx = 0; idx < num_ctas; ++idx) {
    order[idx] = idx;
    swap_cta(idx);
    simt::machine.random.seed(random());
    simt::machine.start(num_threads, 0, kernel);
    wgmmas.assign(num_threads, std::vector<std::vector<Wgmma>>(1));
    swap_cta(idx);
  }
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    simt::Machine::Pass all{false, false};
    for (const u32 idx : order) {
      swap_cta(idx);
      const simt::Machine::Pass pass = simt::machine.pass();
      swap_cta(idx);
      all = {all.any_left || pass.any_left, all.any_ran || pass.any_ran};
    }
    if (!all.any_left) return;
    if (between()) continue;
    if (all.any_ran) continue;
    bool landed = false;
    std::shuffle(order.begin(), order.end(), random);
    for (u32 i = 0; i < num_ctas && !landed; ++i) {
      swap_cta(order[i]);
      landed = land_a_copy();
      swap_cta(order[i]);
    }
    if (!landed) simt::fail("deadlock: all threads of the grid wait for what never comes", 1, 0);
  }
}

}  // namespace simt90
