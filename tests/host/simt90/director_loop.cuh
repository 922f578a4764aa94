// Stands in for device/director_loop.cuh: the harness publishes the plans; the director's CTA has nothing to do.
// Used by tests/host/simt90/worker_sm90_simt.cpp. Test: pytest tests/host/test_worker_sm90_simt.py
#pragma once
#include <worker.cuh>

namespace blinkimp {

constexpr u32 kDirectorThreads = 64;
BK_INLINE void direct(const EngineParams&) {}

}  // namespace blinkimp
