// Launches the kernel of a name with a host's arguments, which must be what it was compiled for.
#include <cxxabi.h>

#include <cstdlib>
#include <map>

#include "arithmetic.h"
#include "counters.h"
#include "entries.h"
#include "global_memory.h"

namespace ptx_on_host {
namespace {

// As cuda_on_host::kernel_name() has it: no result, no parameters.
std::string readable(const char* mangled) {
  char* const text = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
  std::string name = text == nullptr ? mangled : text;
  std::free(text);
  name = cuda_on_host::short_name(name.substr(0, name.find('(')));
  return name.rfind("void ", 0) == 0 ? name.substr(5) : name;
}

const Entry* entry_of(const std::string& name) {
  static const std::map<std::string, const Entry*> entries = [] {
    std::map<std::string, const Entry*> found;
    for (size_t i = 0; i < kNumEntries; ++i) found[readable(kEntries[i].name)] = &kEntries[i];
    return found;
  }();
  const auto found = entries.find(name);
  return found == entries.end() ? nullptr : found->second;
}

struct Call {
  const Entry* entry;
  const cuda_on_host::Argument* arguments;
};

std::string launch(const Entry& entry, const char* name, const cuda_on_host::LaunchShape& shape,
                   uint64_t seed, const cuda_on_host::Argument* arguments, size_t count) {
  machine.kernel = name;
  const auto refuse = [&](const char* what, size_t found, size_t wanted) {
    return std::string(name) + ": " + std::to_string(found) + " " + what +
           ", and it was compiled for " + std::to_string(wanted);
  };
  if (count != entry.num_parameters) return refuse("parameters", count, entry.num_parameters);
  for (size_t i = 0; i < count; ++i) {
    const size_t wanted = entry.parameter_bytes[i];
    if (arguments[i].bytes != wanted) {
      return refuse("bytes of a parameter", arguments[i].bytes, wanted);
    }
  }
  const auto threads = static_cast<size_t>(shape.threads);
  const auto most = static_cast<size_t>(entry.max_threads);
  if (most != 0 && threads > most) return refuse("threads", threads, most);
  const Call call{&entry, arguments};
  machine.arguments = &call;
  machine.body = [](const void* given) {
    const auto& one = *static_cast<const Call*>(given);
    one.entry->run(one.arguments);
    end_counts();
  };
  run_grid(shape, seed);
  return machine.error;
}

}  // namespace
}  // namespace ptx_on_host

std::string cuda_on_host::launch_compiled(const std::string& name, const LaunchShape& shape,
                                          uint64_t seed, const Argument* arguments, size_t count) {
  const ptx_on_host::Entry* entry = ptx_on_host::entry_of(name);
  if (entry == nullptr) return "nothing was compiled of " + name;
  return ptx_on_host::launch(*entry, name.c_str(), shape, seed, arguments, count);
}

#define EXPORT extern "C" __attribute__((visibility("default"))) void

// The global memory of the next calls: begin, bytes and 1 if it may be written to, of each range.
EXPORT set_global_memory(const int64_t* ranges, int64_t count, char*, int64_t) {
  cuda_on_host::global_memory.clear();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* range = ranges + 3 * i;
    cuda_on_host::global_memory.add(reinterpret_cast<const void*>(range[0]),
                                    static_cast<size_t>(range[1]), range[2] != 0);
  }
}

// How far approximate functions may be off, in units in the last place.
EXPORT set_approximation(int ulps, char*, int64_t) { ptx_on_host::approximation_ulps = ulps; }

// A kernel of which the one parameter is an address.
EXPORT run_kernel(const char* name, int64_t grid, int cluster_size, int threads,
                  int64_t shared_bytes, uint64_t seed, void* memory, char* error,
                  int64_t error_size) {
  const cuda_on_host::Argument argument{&memory, sizeof(memory)};
  const std::string message = cuda_on_host::launch_compiled(
      name, {grid, cluster_size, threads, static_cast<size_t>(shared_bytes)}, seed, &argument, 1);
  std::snprintf(error, static_cast<size_t>(error_size), "%s", message.c_str());
}

#ifdef PTX_COUNT
// What was counted since the last time, as counters.h has it.
EXPORT take_counts(char* text, int64_t size, char* error, int64_t error_size) {
  const std::string found = ptx_on_host::counts_as_text();
  ptx_on_host::all_totals.clear();
  if (found.size() >= static_cast<size_t>(size)) {
    std::snprintf(error, static_cast<size_t>(error_size), "%s", "no room for what was counted");
    return;
  }
  std::snprintf(text, static_cast<size_t>(size), "%s", found.c_str());
}
#endif
