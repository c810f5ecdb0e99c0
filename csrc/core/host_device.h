// Marks a function as usable on the host and, under nvcc, on the device.
#pragma once

#if defined(__CUDACC__)
#define EAFT_HOST_DEVICE __host__ __device__
#else
#define EAFT_HOST_DEVICE
#endif
