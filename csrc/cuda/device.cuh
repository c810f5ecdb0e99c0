// Inline PTX and language extensions (TMA bulk copies and their mbarriers, thread-block clusters
// and their distributed shared memory, cache hints, ex2), behind names that a host can provide too:
// tests/cuda/cuda_on_host has the other half of this file, and runs the kernels here with it.
// Kernels use these, the CUDA builtins for threads, warps and barriers, and nothing else.
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace eaft_ext::cuda {

// The shared memory of the block, as much as its launch asked for.
__device__ inline unsigned char* block_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// 2^x, to two units in the last place; results below 2^-126 become 0.
__device__ inline float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// What was computed from these bits is not kept beyond this point but computed again, which is how
// a rare branch does without registers of its own.
__device__ inline void recompute_from(uint4& bits) {
  asm volatile("" : "+r"(bits.x), "+r"(bits.y), "+r"(bits.z), "+r"(bits.w));
}

// ---- 16 bytes from and to global memory, of data that is used once: past L1.

__device__ inline uint4 load_once(const uint4* source) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(source)));
  return v;
}

__device__ inline void store_once(uint4* target, uint4 v) { __stcs(target, v); }

// ---- TMA bulk copies (cp.async.bulk) from global to shared memory, of compute capability 9.0 and
// up. Addresses and sizes are multiples of 16 bytes. One thread makes an Arrival, which is an
// mbarrier that is used once, and starts the copy whose bytes it counts; any thread may wait for
// it.

struct alignas(8) Arrival {
  uint64_t state;
};

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Makes `count` arrivals, and makes them known to the copy engine. A barrier must stand between
// this and the first wait of another thread.
__device__ inline void make_arrivals(Arrival* arrivals, int count) {
  for (int i = 0; i < count; ++i) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrivals + i))
                 : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void start_bulk_copy(void* target, const void* source, uint32_t bytes,
                                       Arrival* arrival) {
  const uint32_t barrier = shared_address(arrival);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(target)),
      "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ inline void wait_for(const Arrival* arrival) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        "  .reg .pred done;\n"
        "  mbarrier.try_wait.parity.shared::cta.b64 done, [%1], 0;\n"
        "  selp.u32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(arrival))
        : "memory");
  } while (!done);
}

// ---- Thread-block clusters: blocks that see each other's shared memory. A launch without them is
// one of 1.

__device__ inline int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

__device__ inline int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Every thread of the cluster arrives; who waits then sees what all wrote before they arrived.
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
// The same for a thread of which nobody reads what it wrote: without waiting for its writes.
__device__ inline void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Distributed shared memory: where the block of that rank has what this block has at `pointer`.
template <typename T>
__device__ inline const T* of_cluster_rank(const T* pointer, int rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(pointer), "r"(rank));
  return reinterpret_cast<const T*>(address);
}

#else  // never called: the launchers ask the device first

__device__ inline void make_arrivals(Arrival*, int) { __trap(); }
__device__ inline void start_bulk_copy(void*, const void*, uint32_t, Arrival*) { __trap(); }
__device__ inline void wait_for(const Arrival*) { __trap(); }
__device__ inline int cluster_size() { return 1; }
__device__ inline int cluster_rank() { return 0; }
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_arrive_relaxed() {}
__device__ inline void cluster_wait() {}
template <typename T>
__device__ inline const T* of_cluster_rank(const T* pointer, int) {
  return pointer;
}

#endif

}  // namespace eaft_ext::cuda

#else
#include <cuda_on_host.h>
#endif
