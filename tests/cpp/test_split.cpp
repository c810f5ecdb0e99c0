// How few rows are split into spans, and where the spans' results lie: host code, no CUDA.
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <vector>

#include "check.h"
#include "cuda/split.h"

using namespace eaft_ext::cuda;

namespace {

constexpr int kResident = 396;  // of an H100: 132 multiprocessors, 3 blocks each
constexpr int kGranularity = 64;
constexpr int kShortest = 2048;
constexpr int kOverhead = 8192;

SplitPlan choose(int64_t num_rows, int64_t vocab_size, int resident_blocks = kResident) {
  return choose_split(num_rows, vocab_size, resident_blocks, kGranularity, kShortest, kOverhead);
}

// What choose_split() makes as small as it can.
int64_t cost(int64_t num_rows, int64_t count, int64_t length, int resident_blocks) {
  const int64_t rounded = (length + kGranularity - 1) / kGranularity * kGranularity;
  const int64_t waves = (num_rows * count + resident_blocks - 1) / resident_blocks;
  return waves * (rounded + kOverhead);
}

void spans_cover_the_row_and_nothing_else() {
  for (int64_t vocab_size : {1, 2, 63, 64, 65, 2047, 2048, 4095, 4096, 4097, 8191, 50257, 151936,
                             262144, 1 << 20, std::numeric_limits<int>::max()}) {
    for (int64_t num_rows : {0, 1, 2, 3, 64, 131, 395, 396, 397, 1584, 8192}) {
      for (int resident_blocks : {1, 8, 84, kResident, 2000}) {
        const SplitPlan plan = choose(num_rows, vocab_size, resident_blocks);
        const int64_t before_last = int64_t{plan.num_spans - 1} * plan.span_length;
        CHECK_BELOW(0, plan.num_spans);
        CHECK_BELOW(before_last, vocab_size);  // the last span is not empty
        CHECK_BELOW(vocab_size, before_last + plan.span_length + 1);
        CHECK_BELOW(plan.span_length, vocab_size + 1);
        if (plan.num_spans > 1) {
          CHECK_EQUAL(plan.span_length % kGranularity, 0);
          CHECK_BELOW(kShortest, plan.span_length + 1);
        }
        // One span would not have been better.
        CHECK_BELOW(cost(num_rows, plan.num_spans, plan.span_length, resident_blocks),
                    cost(num_rows, 1, vocab_size, resident_blocks) + 1);
        // Blocks are numbered in 31 bits.
        CHECK_BELOW(num_rows * plan.num_spans, int64_t{1} << 31);
      }
    }
  }
}

void few_rows_occupy_the_device() {
  CHECK_BELOW(64, choose(1, 151936).num_spans);
  CHECK_BELOW(kResident - 16, 16 * choose(16, 151936).num_spans);
  CHECK_BELOW(16 * choose(16, 151936).num_spans, kResident + 1);  // in one wave
}

void many_rows_stay_whole() {
  for (int64_t num_rows : {4 * kResident, 8192, std::numeric_limits<int>::max()}) {
    CHECK_EQUAL(choose(num_rows, 151936).num_spans, 1);
    CHECK_EQUAL(choose(num_rows, 151936).span_length, 151936);
  }
}

void short_rows_stay_whole() {
  CHECK_EQUAL(choose(1, 2 * kShortest - 1).num_spans, 1);
  CHECK_EQUAL(choose(1, 2 * kShortest - 1).span_length, 2 * kShortest - 1);
  CHECK_EQUAL(choose(1, 2 * kShortest).num_spans, 2);
}

// The bytes of an array of that many elements, from `from` on; 16-byte aligned.
template <typename T>
void take(std::vector<int>& uses, const unsigned char* memory, const T* from, size_t count) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(from);
  CHECK_EQUAL((bytes - memory) % 16, 0);
  for (size_t i = 0; i < count * sizeof(T); ++i) ++uses.at(bytes - memory + i);
}

template <typename Key>
void arrays_do_not_overlap(bool with_sums) {
  for (int64_t num_rows : {1, 3, 7}) {
    for (int count : {2, 3, 75}) {
      for (int k : {1, 2, 3, 20, 128}) {
        RowSplit<Key> split{count, 64};
        const size_t bytes = lay_out_split(&split, num_rows, k, with_sums, nullptr);
        std::vector<unsigned char> memory(bytes + 1);
        CHECK_EQUAL(lay_out_split(&split, num_rows, k, with_sums, memory.data()), bytes);
        CHECK_EQUAL(split.num_spans, count);
        const size_t items = static_cast<size_t>(num_rows) * count;
        std::vector<int> uses(bytes);
        take(uses, memory.data(), split.top, items * k);
        CHECK_EQUAL(split.sum != nullptr, with_sums);
        CHECK_EQUAL(split.max != nullptr, with_sums);
        if (with_sums) {
          take(uses, memory.data(), split.sum, items);
          take(uses, memory.data(), split.max, items);
        }
        for (int number : uses) CHECK_BELOW(number, 2);
      }
    }
  }
}

void one_span_needs_no_workspace() {
  RowSplit<uint32_t> split{1, 50257};
  CHECK_EQUAL(lay_out_split(&split, 7, 20, true, nullptr), size_t{0});
  CHECK_EQUAL(split.top == nullptr && split.sum == nullptr && split.max == nullptr, true);
}

}  // namespace

int main() {
  spans_cover_the_row_and_nothing_else();
  few_rows_occupy_the_device();
  many_rows_stay_whole();
  short_rows_stay_whole();
  arrays_do_not_overlap<uint32_t>(true);
  arrays_do_not_overlap<uint64_t>(false);
  one_span_needs_no_workspace();
  return failures == 0 ? 0 : 1;
}
