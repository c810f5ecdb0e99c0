// CUDA on the host, for tests: runs the kernels of csrc/cuda on a CPU, thread by thread. This file
// is the other half of csrc/cuda/device.cuh, and what nvcc has built in.
//
//     fibers.h          threads of a kernel, as functions that take turns
//     machine.h         the cluster that runs; fail()
//     faults.h          memory that is not there
//     scheduler.h       who runs next
//     shared_memory.h   a block's memory, poisoned and guarded
//     barriers.h        __syncthreads and its kin
//     warp.h            shuffles, votes, reductions
//     cluster.h         cluster barriers, memory of other blocks
//     bulk_copy.h       asynchronous copies
//     builtins.h        variables, bits, minima, loads, atomics
//     types16.h         __half, __nv_bfloat16
//     launch_on_host.h  launch<kernel>(shape, seed, arguments...)
//
// Every error ends the launch with a sentence: threads that wait for ever, copies that nobody waits
// for, misaligned vectors, memory of a block that has returned, writes behind the shared memory.
// What was not written, or has not arrived, is NaN.
//
// What it cannot see:
// - Races within a stretch between two synchronisations, where a thread runs without interruption
//   but for atomics, load_once and what waits; another order of whole stretches it can see.
// - Memory ordering weaker than sequential, and so a missing fence.
// - Whether blocks that wait for each other outside of a cluster are resident together. A loop that
//   waits for another thread without coming to the scheduler hangs.
// - A missing wait_for of one thread, once another thread's has brought the bytes.
// - Arithmetic of the device: no fused multiply-add, and exact functions for approximate ones.
// - Registers, banks, bandwidth: nothing about speed.
#pragma once

#include "launch_on_host.h"
