// What CUDA C++ has at global scope and that needs no other thread: qualifiers, built-in variables
// and vectors, bits, minima and maxima, loads, atomics.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __noinline__  // nothing, since the standard library writes __attribute__((__noinline__))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
using dim3 = uint3;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Of the current thread.
inline uint3 threadIdx;
inline uint3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;

inline void cuda_on_host::show_builtins(const Thread& thread) {
  threadIdx.x = static_cast<unsigned>(thread.index);
  blockIdx.x = static_cast<unsigned>(thread.block->index);
}

// ---- Bits.

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __clzll(long long bits) {
  return bits == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(bits));
}
inline unsigned __brev(unsigned bits) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (bits >> i & 1u) << (31 - i);
  return result;
}

// ---- Minima and maxima. Of an int and an unsigned the result is unsigned.

namespace cuda_on_host {

// The pairs that CUDA has overloads for.
template <typename A, typename B>
struct MinMax {};
template <typename T>
struct MinMax<T, T> : std::enable_if<std::is_integral<T>::value && sizeof(T) >= 4, T> {};
template <>
struct MinMax<int, unsigned> : std::enable_if<true, unsigned> {};
template <>
struct MinMax<unsigned, int> : std::enable_if<true, unsigned> {};

}  // namespace cuda_on_host

template <typename A, typename B>
typename cuda_on_host::MinMax<A, B>::type min(A a, B b) {
  using T = typename cuda_on_host::MinMax<A, B>::type;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
typename cuda_on_host::MinMax<A, B>::type max(A a, B b) {
  using T = typename cuda_on_host::MinMax<A, B>::type;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

namespace cuda_on_host {

// The number, if one is NaN, signalling or not; +0 is above -0. The C library has it otherwise.
inline float max_float(float a, float b) {
  if (a != a || b != b) return a != a ? b : a;
  if (a == b) return signbit(a) ? b : a;
  return a > b ? a : b;
}
inline float min_float(float a, float b) { return -max_float(-a, -b); }

}  // namespace cuda_on_host

#define fmaxf(a, b) ::cuda_on_host::max_float(a, b)
#define fminf(a, b) ::cuda_on_host::min_float(a, b)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ---- Loads and stores.

template <typename T>
T __ldg(const T* source) {
  return *source;
}
template <typename T>
void __stcs(T* target, T value) {
  *target = value;
}

// ---- Atomics, which also are where a thread may be interrupted. None on floats: the order of
// additions would change from run to run.

namespace cuda_on_host {

template <typename T, typename Combine>
T atomic(T* target, const Combine& combine) {
  static_assert(std::is_same<T, int>::value || std::is_same<T, unsigned>::value, "");
  yield();
  const T before = *target;
  *target = combine(before);
  return before;
}

}  // namespace cuda_on_host

template <typename T>
T atomicAdd(T* target, T value) {
  return cuda_on_host::atomic(target, [&](T before) { return static_cast<T>(before + value); });
}
template <typename T>
T atomicMax(T* target, T value) {
  return cuda_on_host::atomic(target, [&](T before) { return max(before, value); });
}
template <typename T>
T atomicMin(T* target, T value) {
  return cuda_on_host::atomic(target, [&](T before) { return min(before, value); });
}
template <typename T>
T atomicOr(T* target, T value) {
  return cuda_on_host::atomic(target, [&](T before) { return before | value; });
}

[[noreturn]] inline void __trap(cuda_on_host::Place place = cuda_on_host::Place::here()) {
  cuda_on_host::fail(place, "__trap");
}

// ---- The names of csrc/cuda/device.cuh that need no other thread.

namespace eaft_ext::cuda {

inline unsigned char* block_memory() { return cuda_on_host::machine.current->block->arena.base(); }

// Exact where the device approximates, but for results below 2^-126, which become 0.
inline float exp2_approximate(float x) {
  const float result = exp2f(x);
  return result < 0x1p-126f ? 0.0f : result;
}

inline void recompute_from(uint4&) {}

inline void check_vector(const void* pointer, const char* operation, cuda_on_host::Place place) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0) return;
  cuda_on_host::fail(place, "%s at %p, which is not a multiple of 16", operation, pointer);
}

inline uint4 load_once(const uint4* source,
                       cuda_on_host::Place place = cuda_on_host::Place::here()) {
  check_vector(source, "load_once", place);
  cuda_on_host::yield();
  uint4 result;
  std::memcpy(&result, static_cast<const void*>(source), sizeof(result));
  return result;
}

inline void store_once(uint4* target, uint4 value,
                       cuda_on_host::Place place = cuda_on_host::Place::here()) {
  check_vector(target, "store_once", place);
  std::memcpy(static_cast<void*>(target), &value, sizeof(value));
}

}  // namespace eaft_ext::cuda
