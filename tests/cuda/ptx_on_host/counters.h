// What a launch does, counted as it runs, in libraries built with PTX_COUNT: bytes and sectors of
// global memory, conflicts of banks, instructions by class. Lanes of a warp that execute the same
// instruction for the same time, counted from the thread's start, are taken to do it together.
#pragma once

#include "values.h"

#ifdef PTX_COUNT
#include <algorithm>
#include <array>
#include <iterator>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>
#endif

namespace ptx_on_host {

enum class Space { kGlobal, kShared };

// As in translate.py.
enum Class { kInteger, kFloat32, kFloat64, kSpecial, kMemory, kOther, kNumClasses };

#ifdef PTX_COUNT

constexpr u64 kSectorBytes = 32;
constexpr u32 kBanks = 32;
constexpr u32 kWarpLanes = 32;

struct AccessTotals {
  u64 bytes;
  u64 requests;    // of warps
  u64 sectors;     // of global memory: the distinct ones of each request
  u64 touched;     // of global memory: the distinct sectors of each block, as if L1 kept them
  u64 wavefronts;  // of shared memory: as many as the fullest bank needs
  u64 conflicts;   // wavefronts beyond those of the same request without conflicts
};

struct Totals {
  AccessTotals access[2][2];  // by space, loads and stores
  u64 copied_bytes;           // by bulk copies
  u64 atomics;
  u64 barriers;                               // waited at by blocks
  std::array<u64, kNumClasses> instructions;  // of threads
  std::array<u64, kNumClasses> warp_instructions;
};

struct CountedAccess {
  u32 warp;
  u32 line;
  u32 visit;
  u32 lane;
  u32 bytes;
  Space space;
  bool is_store;
  u64 address;

  bool with(const CountedAccess& other) const {
    return warp == other.warp && line == other.line && visit == other.visit;
  }
};

struct BlockCounts {
  std::vector<CountedAccess> accesses;
  std::vector<std::unordered_map<u32, u32>> visits;               // of each thread, by line
  std::unordered_map<u32, std::array<u32, kNumClasses>> classes;  // of each basic block, by line
  std::vector<std::unordered_map<u32, u32>> passes;  // of each thread through each basic block
};

inline std::map<std::string, Totals> all_totals;
inline BlockCounts block_counts[cuda_on_host::kMaxClusterSize];

inline BlockCounts& own_counts() {
  BlockCounts& counts = block_counts[machine.current->block->rank];
  counts.visits.resize(static_cast<size_t>(machine.num_threads));
  counts.passes.resize(static_cast<size_t>(machine.num_threads));
  return counts;
}

inline void count_access(Space space, bool is_store, u64 address, size_t bytes, Place place) {
  BlockCounts& counts = own_counts();
  const auto thread = static_cast<u32>(machine.current->index);
  const auto line = static_cast<u32>(place.line);
  const u32 visit = counts.visits[thread][line]++;
  counts.accesses.push_back({thread / kWarpLanes, line, visit, thread % kWarpLanes,
                             static_cast<u32>(bytes), space, is_store, address});
}

inline void count_copy(u32 bytes) { all_totals[machine.kernel].copied_bytes += bytes; }
inline void count_atomic() { ++all_totals[machine.kernel].atomics; }

// The current thread begins a basic block with so many instructions of each class.
template <u32... kCounts>
void count_instructions(u32 line) {
  BlockCounts& counts = own_counts();
  counts.classes[line] = {kCounts...};
  ++counts.passes[static_cast<u32>(machine.current->index)][line];
}

// The distinct units of so many bytes that accesses of a warp touch.
inline u64 distinct_units(const CountedAccess* first, const CountedAccess* last, u64 unit) {
  std::vector<u64> units;
  for (const CountedAccess* one = first; one != last; ++one) {
    for (u64 u = one->address / unit; u <= (one->address + one->bytes - 1) / unit; ++u) {
      units.push_back(u);
    }
  }
  std::sort(units.begin(), units.end());
  return static_cast<u64>(std::unique(units.begin(), units.end()) - units.begin());
}

// 4 bytes of each bank at a time; lanes with 8 or 16 bytes take turns by halves or quarters.
inline void count_banks(const CountedAccess* first, const CountedAccess* last,
                        AccessTotals* totals) {
  const u32 lanes_at_once = first->bytes <= 4 ? kWarpLanes : 4 * kWarpLanes / first->bytes;
  for (u32 begin = 0; begin < kWarpLanes; begin += lanes_at_once) {
    std::vector<u64> words;
    for (const CountedAccess* one = first; one != last; ++one) {
      if (one->lane < begin || one->lane >= begin + lanes_at_once) continue;
      for (u64 w = one->address / 4; w <= (one->address + one->bytes - 1) / 4; ++w) {
        words.push_back(w);
      }
    }
    if (words.empty()) continue;
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    std::array<u64, kBanks> of_bank{};
    for (const u64 word : words) ++of_bank[word % kBanks];
    const u64 fullest = *std::max_element(of_bank.begin(), of_bank.end());
    totals->wavefronts += fullest;
    totals->conflicts += fullest - 1;
  }
}

// By the last thread of a block that returns.
inline void end_counts() {
  const cuda_on_host::Block& block = *machine.current->block;
  if (block.returned + 1 < machine.num_threads) return;
  BlockCounts& counts = own_counts();
  Totals& totals = all_totals[machine.kernel];
  std::vector<CountedAccess>& all = counts.accesses;
  std::stable_sort(all.begin(), all.end(), [](const CountedAccess& a, const CountedAccess& b) {
    return std::tie(a.warp, a.line, a.visit) < std::tie(b.warp, b.line, b.visit);
  });
  for (size_t begin = 0, end = 0; begin < all.size(); begin = end) {
    while (end < all.size() && all[end].with(all[begin])) ++end;
    const CountedAccess& one = all[begin];
    AccessTotals& access = totals.access[static_cast<int>(one.space)][one.is_store];
    ++access.requests;
    access.bytes += (end - begin) * one.bytes;
    if (one.space == Space::kGlobal) {
      access.sectors += distinct_units(&one, all.data() + end, kSectorBytes);
    } else {
      count_banks(&one, all.data() + end, &access);
    }
  }
  for (const bool is_store : {false, true}) {
    std::vector<CountedAccess> global;
    std::copy_if(all.begin(), all.end(), std::back_inserter(global), [&](const CountedAccess& a) {
      return a.space == Space::kGlobal && a.is_store == is_store;
    });
    const u64 touched = distinct_units(global.data(), global.data() + global.size(), kSectorBytes);
    totals.access[static_cast<int>(Space::kGlobal)][is_store].touched += touched;
  }
  for (const auto& [line, classes] : counts.classes) {
    for (u32 warp = 0; warp * kWarpLanes < counts.passes.size(); ++warp) {
      u64 sum = 0;
      u64 most = 0;
      for (u32 lane = 0; lane < kWarpLanes; ++lane) {
        const u32 thread = warp * kWarpLanes + lane;
        if (thread >= counts.passes.size()) break;
        const auto found = counts.passes[thread].find(line);
        const u64 passes = found == counts.passes[thread].end() ? 0 : found->second;
        sum += passes;
        most = std::max(most, passes);
      }
      for (int c = 0; c < kNumClasses; ++c) {
        totals.instructions[c] += sum * classes[c];
        totals.warp_instructions[c] += most * classes[c];
      }
    }
  }
  totals.barriers += static_cast<u64>(machine.current->block_barriers);
  counts = {};
}

// A line for each number: kernel, name, number.
inline std::string counts_as_text() {
  std::string text;
  for (const auto& [kernel, totals] : all_totals) {
    const auto add = [&, name = kernel](const std::string& what, u64 number) {
      text += name + "\t" + what + "\t" + std::to_string(number) + "\n";
    };
    const char* const spaces[] = {"global", "shared"};
    const char* const directions[] = {"load", "store"};
    for (int space = 0; space < 2; ++space) {
      for (int store = 0; store < 2; ++store) {
        const AccessTotals& access = totals.access[space][store];
        const std::string prefix = std::string(spaces[space]) + "_" + directions[store] + "_";
        add(prefix + "bytes", access.bytes);
        add(prefix + "requests", access.requests);
        add(prefix + "sectors", access.sectors);
        add(prefix + "touched", access.touched);
        add(prefix + "wavefronts", access.wavefronts);
        add(prefix + "conflicts", access.conflicts);
      }
    }
    add("copied_bytes", totals.copied_bytes);
    add("atomics", totals.atomics);
    add("barriers", totals.barriers);
    const char* const classes[] = {"integer", "float32", "float64", "special", "memory", "other"};
    for (int c = 0; c < kNumClasses; ++c) {
      add(std::string("instructions_") + classes[c], totals.instructions[c]);
      add(std::string("warp_instructions_") + classes[c], totals.warp_instructions[c]);
    }
  }
  return text;
}

#else

inline void count_access(Space, bool, u64, size_t, Place) {}
inline void count_copy(u32) {}
inline void count_atomic() {}
inline void end_counts() {}

#endif

}  // namespace ptx_on_host
