// When a word of shared memory changes, seen without an interpreter in between: what the device stamps with its clock and the host sees bounds how far the two
// clocks are apart. Called by host/watch_word.py through ctypes. Test: pytest tests/host/test_watch_word.py
#include <ptx.cuh>

using namespace blinkimp;

extern "C" {

// Spins until `word` has changed num_changes times or timeout_ns are over. Leaves each new value and the time of its first sight; returns how many there are.
u32 bk_watch_word(const u64* word, u32 num_changes, u64 timeout_ns, u64* values, u64* seen_ns) {
  const u64 begin_ns = device_clock_ns();
  u64 before = ld_relaxed_sys(word);
  u32 num_seen = 0;
  while (num_seen < num_changes) {
    const u64 value = ld_relaxed_sys(word);  // relaxed: the word stands for itself
    const u64 now_ns = device_clock_ns();
    if (now_ns - begin_ns > timeout_ns) break;
    if (value == before) continue;
    values[num_seen] = before = value;
    seen_ns[num_seen] = now_ns;
    num_seen += 1;
  }
  return num_seen;
}

}  // extern "C"
