// Occupancy: how many blocks of a kernel a device holds at once. Asked of the device, once for each
// kernel and device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>

namespace eaft_ext::cuda {

// Blocks of a kernel that are resident at once on the current device. One object for each kernel,
// number of threads and size of the shared memory.
class ResidentBlocks {
 public:
  template <typename Kernel>
  cudaError_t get(Kernel* kernel, int threads, size_t shared_bytes, int* blocks) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    const bool remembered = device < kMaxDevices;
    if (remembered && (*blocks = known_[device].load(std::memory_order_relaxed)) > 0) {
      return cudaSuccess;
    }
    int per_multiprocessor = 0;
    int multiprocessors = 0;
    if (const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
            &per_multiprocessor, kernel, threads, shared_bytes)) {
      return error;
    }
    if (const cudaError_t error =
            cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) {
      return error;
    }
    *blocks = per_multiprocessor * multiprocessors;
    if (remembered) known_[device].store(*blocks, std::memory_order_relaxed);
    return cudaSuccess;
  }

 private:
  static constexpr int kMaxDevices = 64;
  std::atomic<int> known_[kMaxDevices] = {};
};

}  // namespace eaft_ext::cuda
