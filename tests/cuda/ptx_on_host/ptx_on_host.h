// The compiled CUDA kernels on the host: what nvcc makes of csrc/cuda, as PTX, becomes C++, a
// statement for each instruction, and runs on the shim's machine (cuda_on_host), thread by thread.
// So the assembly in device.cuh, what is for the device alone, and nvcc's own code are executed,
// which the shim alone never does.
//
//     ptx.py             reads PTX
//     opcodes.py         what each opcode means, by the PTX ISA (version 9.0)
//     flow.py            registers that may be read before they are written
//     translate.py       writes C++
//     compiled.py        nvcc, the translator, g++; libraries of kernels
//     count.py           the table of docs/performance.md
//     values.h           types, and registers as one of them
//     arithmetic.h       shifts, bit fields, rounding, NaN, approximations
//     memory.h           state spaces, generic addresses, bounds
//     synchronisation.h  barriers, shuffles, votes
//     bulk_copies.h      mbarriers, bulk copies
//     counters.h         bytes, sectors, banks, instructions, where a library is built to count
//     entries.h          the kernels of a library; launch.cpp starts them
//
// What is not known, opcode, modifier, type or directive, stops the translator with its line. An
// error of a kernel ends its launch with a sentence and the line of the PTX: an access outside of
// the arguments' memory, misaligned, or in another space; a register that is read unwritten; a
// launch with parameters or threads that the kernel was not compiled for.
//
// What it cannot see:
// - What ptxas does: registers, scheduling, the contraction of a product and a sum (PTX leaves it
//   that freedom where an instruction says no rounding), and its mistakes.
// - Weak memory ordering, and so a missing fence, release or acquire; real asynchrony.
//   fence.proxy.async is looked for; the other fences are not.
// - Races between two synchronisations: threads take turns as the shim has them.
// - Whether what is said to be uniform (bra.uni, call.uni) is.
// - Occupancy, launch attributes, clusters that find no room: the launchers of csrc/cuda do not
// run.
// - Clusters, mbarriers and bulk copies beyond the shim's model, in which an mbarrier is used once.
// - Functions of the device: approximations are exact, or off by what a test asks for.
#pragma once

#include "arithmetic.h"
#include "bulk_copies.h"
#include "memory.h"
#include "synchronisation.h"
