// What kernels call: checks of arguments, then the block's operations.
#include "runtime.h"

#include <cstring>

#include "block.h"
#include "races.h"

namespace pyconv::emulation {

int run(const Launch& launch) { return Device::current().run(launch); }

void* shared_memory(size_t bytes) {
  SharedMemory& shared = Device::current().shared();
  if (bytes > shared.bytes()) {
    fail("the kernel uses %zu bytes of shared memory, but was launched with %zu", bytes, shared.bytes());
  }
  return shared.begin();
}

// ---- Barriers and votes -------------------------------------------------------------------------------------

void block_barrier(Site site) { Device::current().block_barrier(site); }

void warp_barrier(uint32_t mask, Site site) {
  const auto complete = [](const Meeting& meeting) { races_warp_barrier(meeting.lanes); };
  Device::current().meet(mask, site, complete, nullptr, /*all=*/false);
}

uint32_t ballot(uint32_t mask, bool predicate, Site site) {
  struct Slot {
    bool predicate;
    uint32_t result;
  };
  const auto complete = [](const Meeting& meeting) {
    uint32_t result = 0;
    for (uint32_t left = meeting.lanes; left != 0; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      if (static_cast<Slot*>(meeting.slots[lane])->predicate) result |= 1u << lane;
    }
    for (uint32_t left = meeting.lanes; left != 0; left &= left - 1) {
      static_cast<Slot*>(meeting.slots[__builtin_ctz(left)])->result = result;
    }
  };
  Slot slot{predicate, 0};
  Device::current().meet(mask, site, complete, &slot, /*all=*/false);
  return slot.result;
}

// ---- Shuffles -----------------------------------------------------------------------------------------------

namespace {

struct ShuffleSlot {
  ShuffleKind kind;
  uint64_t value;
  int operand, width;
  uint64_t result;
};

// The lane that `lane` reads; its own where the one asked for lies outside of its segment.
int source_lane(const ShuffleSlot& slot, int lane) {
  const int first = lane & ~(slot.width - 1), last = first + slot.width - 1;
  switch (slot.kind) {
    case ShuffleKind::index: return first + (slot.operand & (slot.width - 1));
    case ShuffleKind::up: return lane - slot.operand >= first ? lane - slot.operand : lane;
    case ShuffleKind::down: return lane + slot.operand <= last ? lane + slot.operand : lane;
    case ShuffleKind::exclusive_or: return (lane ^ slot.operand) <= last ? lane ^ slot.operand : lane;
  }
  return lane;
}

void complete_shuffle(const Meeting& meeting) {
  for (uint32_t left = meeting.lanes; left != 0; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    auto& slot = *static_cast<ShuffleSlot*>(meeting.slots[lane]);
    const int source = source_lane(slot, lane);
    if (source < 0 || source >= kWarpSize || !(meeting.lanes >> source & 1u)) {
      fail_at(meeting.site, "shuffle: lane %d reads from lane %d, which does not take part (lanes 0x%08x do)", lane,
              source, meeting.lanes);
    }
    slot.result = static_cast<ShuffleSlot*>(meeting.slots[source])->value;
  }
}

}  // namespace

uint64_t shuffle(ShuffleKind kind, uint32_t mask, uint64_t value, int operand, int width, Site site) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0) {
    fail_at(site, "shuffle: expected a width of 1, 2, 4, 8, 16 or 32, but got %d", width);
  }
  ShuffleSlot slot{kind, value, operand, width, 0};
  Device::current().meet(mask, site, complete_shuffle, &slot, /*all=*/false);
  return slot.result;
}

// ---- Asynchronous copies ------------------------------------------------------------------------------------

void copy_async(void* to, const void* from, int bytes, bool valid, Site site) {
  Device& device = Device::current();
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || (valid && reinterpret_cast<uintptr_t>(from) % bytes != 0)) {
    fail_at(site, "cp.async: expected both sides at a multiple of %d bytes, but got to %p from %p", bytes, to, from);
  }
  if (!device.shared().contains(to, bytes)) {
    fail_at(site, "cp.async: expected a destination in the block's shared memory of %zu bytes, but got offset %td",
            device.shared().bytes(), static_cast<char*>(to) - device.shared().begin());
  }
  AsynchronousCopy copy{to, bytes, {}};
  if (valid) std::memcpy(copy.data, from, bytes);
  device.thread().copies.push_back(copy);
  record_copy_begin(to, bytes, site);
  std::memset(to, 0xff, bytes);
}

void copies_commit() {
  Thread& thread = Device::current().thread();
  thread.group_ends.push_back(thread.copies.size());
}

void copies_wait(int groups_under_way, Site site) {
  Device& device = Device::current();
  Thread& thread = device.thread();
  const int complete = static_cast<int>(thread.group_ends.size()) - groups_under_way;
  if (complete <= 0) return;
  const size_t copies = thread.group_ends[complete - 1];
  if (copies > 0) device.pause();
  for (size_t i = 0; i < copies; ++i) {
    const AsynchronousCopy& copy = thread.copies[i];
    record_copy_end(copy.to, copy.bytes, site);
    std::memcpy(copy.to, copy.data, copy.bytes);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(copies));
  thread.group_ends.erase(thread.group_ends.begin(), thread.group_ends.begin() + complete);
  for (size_t& end : thread.group_ends) end -= copies;
}

}  // namespace pyconv::emulation
