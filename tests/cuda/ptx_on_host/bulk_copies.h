// mbarriers and bulk copies (PTX ISA, "mbarrier", "Data Movement and Conversion Instructions:
// Bulk copy"), on those of the shim. An mbarrier is used once: one thread arrives, expects the
// bytes of one copy, and its first phase, of parity 0, is all that anybody waits for.
#pragma once

#include "memory.h"

namespace ptx_on_host {

// What the shim's BulkCopy of the same place does not know.
struct Expectation {
  bool fenced;  // made known to the copy engine
  bool expected;
  u32 bytes;
};
inline std::vector<Expectation> expectations[cuda_on_host::kMaxClusterSize];

inline eaft_ext::cuda::Arrival* arrival_at(u64 address, Access access, Place place) {
  return shared_address<eaft_ext::cuda::Arrival>(*machine.current->block, address, access, place);
}

// Those of the own block, as long as it runs.
inline std::vector<Expectation>& own_expectations() {
  const cuda_on_host::Block& block = *machine.current->block;
  std::vector<Expectation>& all = expectations[block.rank];
  all.resize(block.copies.size());
  return all;
}

inline Expectation& expectation_of(const eaft_ext::cuda::Arrival* arrival, const char* name,
                                   Place place) {
  const cuda_on_host::BulkCopy& copy = cuda_on_host::copy_of(arrival, name, place);
  return own_expectations()[&copy - machine.current->block->copies.data()];
}

inline void mbarrier_init(u64 address, u32 count, Place place = Place::here()) {
  if (count != 1) fail(place, "mbarrier.init for %u arrivals, where the machine knows 1", count);
  eaft_ext::cuda::make_arrivals(arrival_at(address, Access::kStore, place), 1, place);
  own_expectations().back() = {};
}

// "fence.proxy.async": of the thread that made the mbarriers.
inline void fence_async() {
  const std::vector<cuda_on_host::BulkCopy>& copies = machine.current->block->copies;
  std::vector<Expectation>& all = own_expectations();
  for (size_t i = 0; i < copies.size(); ++i) {
    if (copies[i].maker == machine.current) all[i].fenced = true;
  }
}

inline void mbarrier_expect(u64 address, u32 bytes, Place place = Place::here()) {
  const char* const name = "mbarrier.arrive.expect_tx";
  auto* const arrival = arrival_at(address, Access::kAtomic, place);
  Expectation& expectation = expectation_of(arrival, name, place);
  if (expectation.expected) fail(place, "%s for the second time", name);
  expectation.expected = true;
  expectation.bytes = bytes;
}

inline void bulk_copy(u64 target, u64 source, u32 bytes, u64 mbarrier,
                      Place place = Place::here()) {
  auto* const arrival = arrival_at(mbarrier, Access::kAtomic, place);
  const Expectation& expectation = expectation_of(arrival, "cp.async.bulk", place);
  if (!expectation.fenced) fail(place, "cp.async.bulk, and no fence.proxy.async before it");
  if (!expectation.expected || expectation.bytes != bytes) {
    fail(place, "cp.async.bulk of %u bytes, where the mbarrier expects %u", bytes,
         expectation.bytes);
  }
  if (!cuda_on_host::global_memory.holds(source, bytes, false)) {
    refuse_access("global", Access::kLoad, source, bytes, "belongs to no argument", place);
  }
  unsigned char* const base = machine.current->block->arena.base();
  eaft_ext::cuda::start_bulk_copy(base + (target - kSharedBegin),
                                  reinterpret_cast<const void*>(source), bytes, arrival, place);
  count_copy(bytes);
}

// "mbarrier.try_wait.parity": may also give up before the phase is complete.
inline pred mbarrier_wait(u64 address, u32 parity, Place place = Place::here()) {
  if (parity > 1) fail(place, "mbarrier.try_wait.parity with the parity %u", parity);
  const auto* const arrival = arrival_at(address, Access::kLoad, place);
  expectation_of(arrival, "mbarrier.try_wait", place);
  if (parity == 1) return true;  // the phase before the first one is complete
  if (machine.shuffled && machine.random.below(4) == 0) {
    cuda_on_host::yield();
    return false;
  }
  eaft_ext::cuda::wait_for(arrival, place);
  return true;
}

}  // namespace ptx_on_host
