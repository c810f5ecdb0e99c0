// Runs a fuzz target without libFuzzer: first every file that it is given, then inputs made of
// random bytes and of changed files, for so many seconds.
//
//   fuzz_row_kernels [--seconds N] [--seed N] FILE...
//
// The last line says how many inputs there were. An input that a run ends at is left in
// crash-<seed>-<number>.
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Bytes = std::vector<uint8_t>;

constexpr size_t kMaxBytes = 256;

Bytes current;
std::string crash_file;

void keep_input() {
  std::ofstream(crash_file, std::ios::binary)
      .write(reinterpret_cast<const char*>(current.data()),
             static_cast<std::streamsize>(current.size()));
  std::fprintf(stderr, "the input is in %s\n", crash_file.c_str());
}

void run(Bytes input) {
  current = std::move(input);
  LLVMFuzzerTestOneInput(current.data(), current.size());
}

Bytes random_bytes(std::mt19937& random) {
  Bytes bytes(random() % kMaxBytes);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

// Some bytes changed, and maybe the end cut off or random bytes behind it.
Bytes changed(Bytes bytes, std::mt19937& random) {
  for (uint32_t count = 1 + random() % 4; count > 0 && !bytes.empty(); --count) {
    bytes[random() % bytes.size()] = static_cast<uint8_t>(random());
  }
  if (random() % 4 == 0 && !bytes.empty()) bytes.resize(random() % bytes.size());
  if (random() % 4 == 0) {
    const Bytes more = random_bytes(random);
    bytes.insert(bytes.end(), more.begin(), more.end());
  }
  return bytes;
}

}  // namespace

// Of the sanitizers, that end the process by themselves.
extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

int main(int count, char** arguments) {
  double seconds = 0;
  unsigned seed = 1;
  std::vector<Bytes> corpus;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "--seconds") == 0 && i + 1 < count) {
      seconds = std::atof(arguments[++i]);
    } else if (std::strcmp(arguments[i], "--seed") == 0 && i + 1 < count) {
      seed = static_cast<unsigned>(std::atoi(arguments[++i]));
    } else {
      std::ifstream file(arguments[i], std::ios::binary);
      if (!file) {
        std::fprintf(stderr, "cannot read %s\n", arguments[i]);
        return 2;
      }
      corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
  }
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(keep_input);
  std::signal(SIGABRT, [](int) {
    keep_input();
    std::_Exit(1);
  });
  crash_file = "crash-" + std::to_string(seed) + "-corpus";
  for (const Bytes& bytes : corpus) run(bytes);
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  std::mt19937 random(seed);
  uint64_t executions = 0;
  while (Clock::now() < end) {
    crash_file = "crash-" + std::to_string(seed) + "-" + std::to_string(++executions);
    const bool afresh = corpus.empty() || random() % 4 == 0;
    run(afresh ? random_bytes(random) : changed(corpus[random() % corpus.size()], random));
  }
  std::printf("%zu files, %llu random inputs\n", corpus.size(),
              static_cast<unsigned long long>(executions));
  return 0;
}
