// The library as a LibTorch program uses it: linked, found by name, called.
#include <torch/torch.h>

#include <string_view>
#include <tuple>
#include <vector>

#include "check.h"

int main() {
  torch::manual_seed(0);
  const auto logits = torch::randn({5, 1000});
  const auto labels = torch::randint(0, 1000, {5});

  const auto topk = c10::Dispatcher::singleton()
                        .findSchemaOrThrow("eaft_ext::topk", "")
                        .typed<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, int64_t)>();
  const auto [values, indices] = topk.call(logits, 20);
  CHECK_EQUAL(torch::equal(values, std::get<0>(logits.topk(20))), true);

  using T = at::Tensor;
  using Seven = std::tuple<T, T, T, T, T, T, T>;
  const auto forward =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("eaft_ext::gated_ce_forward", "")
          .typed<Seven(const at::Tensor&, const at::Tensor&, int64_t, std::string_view,
                       c10::ArrayRef<double>, int64_t, bool, c10::ArrayRef<double>, int64_t)>();
  const std::vector<double> none;
  const auto result = forward.call(logits, labels, 20, "none", none, -100, false, none, 0);
  const auto expected = torch::nn::functional::cross_entropy(
      logits, labels, torch::nn::functional::CrossEntropyFuncOptions().reduction(torch::kNone));
  CHECK_EQUAL(torch::allclose(std::get<0>(result), expected, 1e-5, 1e-5), true);
  return failures == 0 ? 0 : 1;
}
