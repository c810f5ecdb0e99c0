// The row kernels by several threads, for the thread sanitizer to watch: rows and blocks shared out
// as ops_cpu.cpp shares them out, by threads of the standard library, whose waiting it sees, unlike
// that of OpenMP. The results are those of one thread, in every bit.
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/row_kernels.h"
#include "cpu/shard_kernels.h"

using namespace eaft_ext;
using namespace eaft_ext::cpu;

namespace {

constexpr int64_t kRows = 6;
constexpr int64_t kVocabSize = 3 * kBlockSize + 77;

// body(i) for i from 0 to count, each thread with a run of its own.
void in_threads(int num_threads, int64_t count, const std::function<void(int64_t)>& body) {
  std::vector<std::thread> threads;
  for (int thread = 0; thread < num_threads; ++thread) {
    threads.emplace_back([=, &body] {
      const int64_t end = count * (thread + 1) / num_threads;
      for (int64_t i = count * thread / num_threads; i < end; ++i) body(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TokenLoss make_loss() {
  TokenLoss loss;
  loss.k = 20;
  loss.gate.kind = GateKind::kEntropy;
  loss.gate.first = 1;
  loss.gate.normalizer_is_log_k = true;
  loss.map = {0.5, 30};
  loss.label_smoothing = 0.1;
  loss.z_loss = 1e-4;
  loss.tells_entropy = true;
  return for_vocab(loss, kVocabSize);
}

template <typename Element>
struct Results {
  std::vector<double> numbers;
  std::vector<uint8_t> gradient;
  std::vector<Compute<Element>> partials;

  bool operator==(const Results& other) const {
    return numbers == other.numbers && gradient == other.gradient && partials == other.partials;
  }
};

// Forward, partials, top-k, and the gradient over a copy of the logits. by_blocks: the blocks of a
// row are shared out, or rows are.
template <typename Element>
Results<Element> run(const std::vector<Element>& logits, int num_threads, bool by_blocks) {
  using Real = Compute<Element>;
  const TokenLoss loss = make_loss();
  RowLayout layout;
  layout.num_dims = 1;
  layout.sizes[0] = kRows;
  layout.strides[0] = kVocabSize;
  std::vector<Element> written = logits;
  const Rows<const Element> rows{written.data(),        layout, kRows, kVocabSize,
                                 {Real(0.5), Real(30)}, true,   true};
  const Rows<Element> gradient{written.data(), layout, kRows, kVocabSize};
  const int64_t num_blocks = rows.num_blocks();
  RowScans<Real> scans(rows, kRows);
  std::vector<TokenStats<double>> tokens(kRows);
  Results<Element> results;
  results.partials.resize(kRows * partial_size(loss));
  const auto label = [](int64_t row) { return row * 1001; };
  const auto scan = [&](int64_t row, int64_t block) {
    scan_block<Scan::kSum>(rows, row, block, scans[row]);
  };
  const auto finish = [&](int64_t row) {
    tokens[row] = finish_row(rows, row, scans[row], label(row), loss);
    Real* partial = results.partials.data() + row * partial_size(loss);
    clear_partial(partial, label(row), loss);
    finish_partial(rows, row, scans[row], label(row), label(row), loss, partial);
  };
  const auto write = [&](int64_t row, int64_t block) {
    const auto max = static_cast<Real>(tokens[row].row_max);
    const auto log_sum = static_cast<Real>(tokens[row].log_sum);
    const auto weights =
        row_weights(loss, Real(1), static_cast<Real>(tokens[row].gate), max, log_sum);
    gradient_block(rows, gradient, row, block, {weights, max, log_sum, label(row)});
  };
  if (by_blocks) {
    const int64_t items = kRows * num_blocks;
    in_threads(num_threads, items, [&](int64_t i) { scan(i / num_blocks, i % num_blocks); });
    in_threads(num_threads, kRows, finish);
    // The row of the label is read by one block alone: each may be written over by its own thread.
    in_threads(num_threads, items, [&](int64_t i) { write(i / num_blocks, i % num_blocks); });
  } else {
    in_threads(num_threads, kRows, [&](int64_t row) {
      for (int64_t block = 0; block < num_blocks; ++block) scan(row, block);
      finish(row);
      for (int64_t block = 0; block < num_blocks; ++block) write(row, block);
    });
  }
  for (const auto& token : tokens) {
    results.numbers.insert(results.numbers.end(), {token.loss, token.nll, token.entropy, token.gate,
                                                   token.entropy_of_all});
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(written.data());
  results.gradient.assign(bytes, bytes + written.size() * sizeof(Element));
  return results;
}

template <typename Element>
void threads_give_the_same_bits() {
  std::mt19937 random(1);
  std::normal_distribution<double> normal(0, 10);
  std::vector<Element> logits(kRows * kVocabSize);
  for (Element& x : logits) x = from_real<Element>(static_cast<Compute<Element>>(normal(random)));
  const Results<Element> alone = run(logits, 1, false);
  for (const bool by_blocks : {false, true}) {
    for (const int num_threads : {2, 4}) {
      CHECK_EQUAL(run(logits, num_threads, by_blocks) == alone, true);
    }
  }
  // Two calls at once, on the same logits.
  std::vector<Results<Element>> both(2);
  in_threads(2, 2, [&](int64_t i) { both[i] = run(logits, 2, i == 1); });
  CHECK_EQUAL(both[0] == alone && both[1] == alone, true);
}

}  // namespace

int main() {
  threads_give_the_same_bits<float>();
  threads_give_the_same_bits<double>();
  threads_give_the_same_bits<BFloat16>();
  threads_give_the_same_bits<Half>();
  return failures == 0 ? 0 : 1;
}
