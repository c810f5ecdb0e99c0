// State spaces and generic addresses (PTX ISA, "State Spaces", "Generic Addressing"). Every access
// is held to its space, to the bounds of what is there, and to its alignment.
#pragma once

#include "counters.h"
#include "global_memory.h"
#include "values.h"

namespace ptx_on_host {

// Shared memory begins here for its block, as on compute capability 8.0 and up: 0 is no address.
constexpr u64 kSharedBegin = 1024;
// Generic addresses of shared memory: a window for the own block, then one for each rank of the
// cluster. No memory of the host has such addresses.
constexpr u64 kSharedWindow = u64{0xaf} << 56;
constexpr u64 kWindowBytes = u64{1} << 24;
// Addresses of a kernel's parameters, for ld.param: a window for each.
constexpr u64 kParameterWindow = u64{0xb1} << 56;

enum class Access { kLoad, kStore, kAtomic };

[[noreturn]] inline void refuse_access(const char* space, Access access, u64 address, size_t bytes,
                                       const char* why, Place place) {
  const char* const names[] = {"reads", "writes", "changes"};
  fail(place, "it %s %zu bytes of %s memory at 0x%llx, which %s", names[static_cast<int>(access)],
       bytes, space, static_cast<unsigned long long>(address), why);
}

// ---- Global memory.

template <typename T>
__attribute__((always_inline)) inline T* global_address(u64 address, Access access, Place place) {
  const bool writes = access != Access::kLoad;
  if (!cuda_on_host::global_memory.holds(address, sizeof(T), writes)) {
    const bool is_shared = address >> 56 == kSharedWindow >> 56;
    refuse_access("global", access, address, sizeof(T),
                  is_shared ? "is an address of shared memory" : "belongs to no argument", place);
  }
  if (address % sizeof(T) != 0) {
    refuse_access("global", access, address, sizeof(T), "is not a multiple of them", place);
  }
  count_access(Space::kGlobal, access == Access::kStore, address, sizeof(T), place);
  return reinterpret_cast<T*>(address);
}

template <typename T>
__attribute__((always_inline)) inline T load_global(u64 address, Place place = Place::here()) {
  return *global_address<T>(address, Access::kLoad, place);
}
template <typename T>
__attribute__((always_inline)) inline void store_global(u64 address, T value,
                                                        Place place = Place::here()) {
  *global_address<T>(address, Access::kStore, place) = value;
}

// ---- Shared memory.

template <typename T>
__attribute__((always_inline)) inline T* shared_address(const cuda_on_host::Block& block,
                                                        u64 address, Access access, Place place) {
  const u64 offset = address - kSharedBegin;
  const size_t bytes = block.arena.bytes();
  if (offset > bytes || sizeof(T) > bytes - offset) {
    refuse_access("shared", access, address, sizeof(T), "is outside of what the block has", place);
  }
  if (address % sizeof(T) != 0) {
    refuse_access("shared", access, address, sizeof(T), "is not a multiple of them", place);
  }
  count_access(Space::kShared, access == Access::kStore, address, sizeof(T), place);
  return reinterpret_cast<T*>(block.arena.base() + offset);
}

template <typename T>
__attribute__((always_inline)) inline T load_shared(u64 address, Place place = Place::here()) {
  return *shared_address<T>(*machine.current->block, address, Access::kLoad, place);
}
template <typename T>
__attribute__((always_inline)) inline void store_shared(u64 address, T value,
                                                        Place place = Place::here()) {
  *shared_address<T>(*machine.current->block, address, Access::kStore, place) = value;
}

// "atom.shared": also where a thread may be interrupted.
template <typename T>
T atomic_add_shared(u64 address, T value, Place place = Place::here()) {
  cuda_on_host::yield();
  T* const target = shared_address<T>(*machine.current->block, address, Access::kAtomic, place);
  count_atomic();
  const T before = *target;
  *target = static_cast<T>(before + value);
  return before;
}

// ---- Generic addresses.

inline bool in_shared_window(u64 address) { return address >> 56 == kSharedWindow >> 56; }

// "cvta": between an address of a space and the generic one.
inline u64 generic_from_shared(u64 address) { return kSharedWindow + address; }
inline u64 shared_from_generic(u64 address, Place place = Place::here()) {
  if (address - kSharedWindow >= kWindowBytes) {
    fail(place, "0x%llx is not in the shared memory of the block",
         static_cast<unsigned long long>(address));
  }
  return address - kSharedWindow;
}
inline u64 global_from_generic(u64 address, Place place = Place::here()) {
  if (in_shared_window(address)) {
    fail(place, "0x%llx is an address of shared memory, not of global memory",
         static_cast<unsigned long long>(address));
  }
  return address;
}

// "mapa": where the block of that rank has what this block has at `address`.
inline u64 address_of_rank(u64 address, u32 rank, Place place = Place::here()) {
  if (rank >= static_cast<u32>(machine.cluster_size)) {
    fail(place, "mapa with rank %u in a cluster of %d", rank, machine.cluster_size);
  }
  return kSharedWindow + (rank + 1) * kWindowBytes + shared_from_generic(address, place);
}

template <typename T>
T* generic_address(u64 address, Access access, Place place) {
  if (!in_shared_window(address)) return global_address<T>(address, access, place);
  const u64 window = (address - kSharedWindow) / kWindowBytes;
  if (window == 0) {
    return shared_address<T>(*machine.current->block, address % kWindowBytes, access, place);
  }
  cuda_on_host::yield();
  if (window > static_cast<u64>(machine.cluster_size)) {
    refuse_access("generic", access, address, sizeof(T), "is in no block of the cluster", place);
  }
  const cuda_on_host::Block& block = machine.blocks[window - 1];
  if (block.returned == machine.num_threads) {
    refuse_access("shared", access, address, sizeof(T), "is of a block that has returned", place);
  }
  return shared_address<T>(block, address % kWindowBytes, access, place);
}

template <typename T>
T load_generic(u64 address, Place place = Place::here()) {
  return *generic_address<T>(address, Access::kLoad, place);
}
template <typename T>
void store_generic(u64 address, T value, Place place = Place::here()) {
  *generic_address<T>(address, Access::kStore, place) = value;
}

// ---- Parameters of a kernel.

inline u64 parameter_address(u32 index) { return kParameterWindow + index * kWindowBytes; }

template <typename T>
T load_parameter(const cuda_on_host::Argument* parameters, u32 count, u64 address,
                 Place place = Place::here()) {
  const u64 index = (address - kParameterWindow) / kWindowBytes;
  const u64 offset = address % kWindowBytes;
  if (index >= count || offset + sizeof(T) > parameters[index].bytes) {
    refuse_access("parameter", Access::kLoad, address, sizeof(T), "is in no parameter", place);
  }
  if (offset % sizeof(T) != 0) {
    refuse_access("parameter", Access::kLoad, address, sizeof(T), "is not a multiple of them",
                  place);
  }
  return from_bytes<T>(static_cast<const unsigned char*>(parameters[index].data) + offset);
}

}  // namespace ptx_on_host
