// C interface of the ingress side of a queue pair: what nic_shim/queue_pair.py calls through ctypes.
//
// Adds to device/ingress_port.cuh what needs an operating system: whether a process lives, the heartbeat thread, and a wait
// on "a completion or a readable file descriptor". One thread uses a port; the heartbeat thread is inside.
// Test: pytest tests/host/test_ingress_port.py
#include <ingress_port.cuh>

#include <errno.h>
#include <poll.h>
#include <signal.h>

#include <new>
#include <system_error>
#include <thread>

namespace blinkimp {
namespace {

// Shared words of the port's owner and its heartbeat thread. Written by the owner; relaxed, for each stands alone: a heartbeat
// with a new epoch and an old lease, or the other way round, is harmless.
struct HeartbeatWords {
  u64 epoch;           // epoch to keep alive, 0 = none
  u64 lease_until_ns;  // without a renewed lease the heartbeat stops: an owner that hangs must be dropped, 0 = no lease
  u32 stop;
};

struct Port {
  IngressPort ring;
  u64 pid;
  HeartbeatWords words;
  std::thread heartbeat_thread;
  u64 last_moved_ns;  // when a poll found completions last, or a request was submitted
};

constexpr u32 kWaitCompletion = 1;
constexpr u32 kWaitReadable = 2;
constexpr u32 kWaitStateChanged = 4;
// Between two looks at the ring: an eighth of the time since the last completion or submission, within these bounds. So the token after a long step waits
// for a few percent of that step, and a wait costs a few dozen wake-ups, however long it is.
constexpr u64 kLeastWaitSliceNs = 50'000;
constexpr u64 kMostWaitSliceNs = 250'000;
constexpr u32 kPingSliceNs = 20'000;

u64 lesser(u64 a, u64 b) { return a < b ? a : b; }

u64 wait_slice_ns(u64 quiet_ns) {
  const u64 slice_ns = lesser(quiet_ns / 8, kMostWaitSliceNs);
  return slice_ns < kLeastWaitSliceNs ? kLeastWaitSliceNs : slice_ns;
}

Port* as_port(void* handle) { return static_cast<Port*>(handle); }

bool process_is_dead(u64 pid) { return pid != 0 && kill(static_cast<pid_t>(pid), 0) != 0 && errno == ESRCH; }

void heartbeat_loop(QueuePair* queue_pair, u64 pid, HeartbeatWords* words, u64 period_ns) {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);  // signals belong to the owner's main thread
  while (ld_relaxed_sys(&words->stop) == 0) {
    const u64 lease_until_ns = ld_relaxed_sys(&words->lease_until_ns);
    if (lease_until_ns == 0 || device_clock_ns() < lease_until_ns) {
      IngressPort::heartbeat(queue_pair, pid, ld_relaxed_sys(&words->epoch));
    }
    sleep_ns(static_cast<u32>(period_ns));
  }
}

}  // namespace
}  // namespace blinkimp

using namespace blinkimp;

extern "C" {

// 0 when the header is sound, else a HeaderField with what was found and what was expected.
u32 bk_port_check_header(const void* region, u64 region_bytes, u64* got, u64* expected) {
  if (region_bytes < sizeof(QueuePair)) {
    *got = region_bytes;
    *expected = sizeof(QueuePair);
    return kHeaderRegionBytes;
  }
  const HeaderCheck check = check_queue_pair_header(static_cast<const QueuePair*>(region)->header, region_bytes);
  *got = check.got;
  *expected = check.expected;
  return check.field;
}

// Null when the header is not sound (bk_port_check_header says why) or memory is exhausted.
void* bk_port_open(void* region, u64 region_bytes, u64 pid) {
  u64 got, expected;
  if (bk_port_check_header(region, region_bytes, &got, &expected) != kHeaderOk) return nullptr;
  Port* port = new (std::nothrow) Port{};
  if (port == nullptr) return nullptr;
  port->ring = IngressPort::open(static_cast<u8*>(region));
  port->pid = pid;
  return port;
}

void bk_port_heartbeat_stop(void* handle) {
  Port* port = as_port(handle);
  if (!port->heartbeat_thread.joinable()) return;
  st_relaxed_sys(&port->words.stop, 1);  // relaxed: join() orders the rest
  port->heartbeat_thread.join();
}

// Starts the heartbeat thread: every period_ns (< 1 s) while the lease lasts. 0 on success, else errno.
i32 bk_port_heartbeat_start(void* handle, u64 period_ns) {
  Port* port = as_port(handle);
  if (period_ns == 0 || period_ns >= 1'000'000'000) return EINVAL;
  if (port->heartbeat_thread.joinable()) return EALREADY;
  st_relaxed_sys(&port->words.stop, 0);
  try {
    port->heartbeat_thread = std::thread(heartbeat_loop, port->ring.queue_pair, port->pid, &port->words, period_ns);
  } catch (const std::system_error& error) {
    return error.code().value() != 0 ? error.code().value() : EAGAIN;
  }
  return 0;
}

// The owner is well: heartbeats go on for lease_ns from now (0: for ever).
void bk_port_renew_lease(void* handle, u64 lease_ns) {
  st_relaxed_sys(&as_port(handle)->words.lease_until_ns, lease_ns == 0 ? 0 : device_clock_ns() + lease_ns);
}

// One heartbeat now, for an owner without the thread. 1 when written, 0 when this port does not own the queue pair.
u32 bk_port_heartbeat(void* handle) {
  Port* port = as_port(handle);
  return IngressPort::heartbeat(port->ring.queue_pair, port->ring.owner_pid, port->ring.epoch) ? 1 : 0;
}

// Becomes the owner and asks the director to attach; kPortOk or kPortBusy.
u32 bk_port_try_attach(void* handle, u64 heartbeat_timeout_ns) {
  Port* port = as_port(handle);
  const u64 owner = ld_relaxed_sys(&port->ring.queue_pair->ingress.owner_pid);  // relaxed: try_attach() looks again
  const u64 dead_pid = process_is_dead(owner) ? owner : 0;
  const u32 status = port->ring.try_attach(port->pid, dead_pid, heartbeat_timeout_ns);
  if (status == kPortOk) st_relaxed_sys(&port->words.epoch, port->ring.epoch);
  return status;
}

u32 bk_port_attach_answered(void* handle) { return as_port(handle)->ring.attach_answered(); }

void bk_port_detach(void* handle) {
  Port* port = as_port(handle);
  st_relaxed_sys(&port->words.epoch, 0);
  port->ring.detach();
}

void bk_port_close(void* handle) {
  bk_port_heartbeat_stop(handle);
  bk_port_detach(handle);
  delete as_port(handle);
}

u32 bk_port_state(void* handle) { return as_port(handle)->ring.state(); }

u64 bk_port_epoch(void* handle) { return as_port(handle)->ring.epoch; }

// order: a RequestOrder.
u32 bk_port_try_submit(void* handle, const void* order) {
  as_port(handle)->last_moved_ns = device_clock_ns();
  return as_port(handle)->ring.try_submit(*static_cast<const RequestOrder*>(order));
}

u32 bk_port_try_load_constraint(void* handle, u32 slot, const u8* table, u64 table_bytes, u64* offset) {
  return as_port(handle)->ring.try_load_constraint(slot, table, table_bytes, offset);
}

u32 bk_port_try_cancel(void* handle, u64 request_id) { return as_port(handle)->ring.try_operation(kSubmissionCancel, request_id, 0); }

u32 bk_port_try_ping(void* handle, u64 request_id, u64 client_ns) {
  return as_port(handle)->ring.try_operation(kSubmissionPing, request_id, client_ns);
}

// A round trip, timed without an interpreter in between: *committed_ns right before the entry is written, *seen_ns at the first sight of a completion, which
// stays on the ring. That it is the answer the caller sees to: it has polled before. Spins for spin_ns, then sleeps in slices. kPortPending: none in time.
u32 bk_port_ping(void* handle, u64 request_id, u64 spin_ns, u64 timeout_ns, u64* committed_ns, u64* seen_ns) {
  const IngressPort& ring = as_port(handle)->ring;
  if (ring.has_completion()) return kPortBusy;
  *committed_ns = device_clock_ns();
  const u32 status = as_port(handle)->ring.try_operation(kSubmissionPing, request_id, *committed_ns);
  if (status != kPortOk) return status;
  while (!ring.has_completion()) {
    const u64 waited_ns = device_clock_ns() - *committed_ns;
    if (waited_ns > timeout_ns) return kPortPending;
    if (waited_ns > spin_ns) sleep_ns(kPingSliceNs);
  }
  *seen_ns = device_clock_ns();
  return kPortOk;
}

u32 bk_port_poll(void* handle, void* out, u32 max_entries) {
  const u32 num_read = as_port(handle)->ring.poll(static_cast<CompletionEntry*>(out), max_entries);
  if (num_read != 0) as_port(handle)->last_moved_ns = device_clock_ns();
  return num_read;
}

// Waits for a completion, for input on `fd` (-1: none), or for the end of the attachment; 0 after timeout_ns.
// Sleeps in short slices on the descriptor, because shared memory cannot wake anybody.
u32 bk_port_wait(void* handle, i32 fd, u64 timeout_ns) {
  Port* port = as_port(handle);
  const u64 deadline_ns = device_clock_ns() + timeout_ns;
  const bool was_attached = port->ring.attached != 0;
  for (;;) {
    u32 events = port->ring.has_completion() ? kWaitCompletion : 0;
    if (was_attached && port->ring.state() != kPortOk) events |= kWaitStateChanged;
    const u64 now_ns = device_clock_ns();
    const u64 left_ns = now_ns < deadline_ns ? deadline_ns - now_ns : 0;
    const u64 slice_ns = events != 0 ? 0 : lesser(left_ns, wait_slice_ns(now_ns - port->last_moved_ns));
    if (fd >= 0) {
      pollfd readable{fd, POLLIN, 0};
      const timespec slice{0, static_cast<long>(slice_ns)};
      if (ppoll(&readable, 1, &slice, nullptr) > 0) events |= kWaitReadable;
    } else if (slice_ns > 0) {
      sleep_ns(static_cast<u32>(slice_ns));
    }
    if (events != 0 || left_ns == 0) return events;
  }
}

}  // extern "C"
