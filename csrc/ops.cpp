// The operators of eaft_ext: their schemas, and nothing else. Devices register in cpu/ops_cpu.cpp
// and cuda/ops_cuda.cpp; fake tensors and autograd in eaft_ext/_registration.py.
//
// Shapes: logits (..., V); labels, weight and all stats (...). Stats and weight are float32,
// float64 for float64 logits.
#include <torch/library.h>

TORCH_LIBRARY(eaft_ext, m) {
  // -> loss, nll, entropy, gate, row_max, log_sum. inplace_backward is for autograd: the gradient
  // then overwrites the logits.
  m.def(
      "gated_ce_forward(Tensor logits, Tensor labels, int k, str gate, float[] gate_parameters, "
      "int ignore_index, bool inplace_backward=False) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // weight * (softmax(logits) - onehot(labels)), from the row_max and log_sum of the forward.
  m.def(
      "gated_ce_backward(Tensor weight, Tensor logits, Tensor labels, Tensor row_max, "
      "Tensor log_sum, int ignore_index) -> Tensor");
  // The same, written over the logits.
  m.def(
      "gated_ce_backward_(Tensor weight, Tensor(a!) logits, Tensor labels, Tensor row_max, "
      "Tensor log_sum, int ignore_index) -> ()");

  // Both at once, a row staying on chip in between. -> loss, nll, entropy, gate, and the gradient
  // of sum(upstream * loss)
  m.def(
      "gated_ce_forward_with_grad(Tensor upstream, Tensor logits, Tensor labels, int k, str gate, "
      "float[] gate_parameters, int ignore_index) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The same, the gradient written over the logits. -> loss, nll, entropy, gate
  m.def(
      "gated_ce_forward_with_grad_(Tensor upstream, Tensor(a!) logits, Tensor labels, int k, "
      "str gate, float[] gate_parameters, int ignore_index) -> (Tensor, Tensor, Tensor, Tensor)");

  // gradient *= factor, a float32 number on its device, unless that is 1: then nothing is touched,
  // and nobody waits for the device to find out. For losses that have their gradient before the
  // backward.
  m.def("scale_gradient_(Tensor(a!) gradient, Tensor factor) -> ()");

  // -> values (..., k), indices (..., k): the largest first, the lowest index first among equals
  m.def("topk(Tensor logits, int k) -> (Tensor, Tensor)");
}
