// The operators of eaft_ext: their schemas, and nothing else. Devices register in cpu/ops_cpu.cpp
// and cuda/ops_cuda.cpp; fake tensors and autograd in eaft_ext/_registration.py.
//
// Shapes: logits (..., V); labels, weight and all stats (...). Stats, weight and partials are
// float32, float64 for float64 logits.
//
// Where the vocabulary is divided into shards, logits are the columns of one of them, from the word
// vocab_start on; columns of words from vocab_size on are padding, which is not read and whose
// gradient is 0.
//
// family is empty, or softcap (0: none), logit_scale, label_smoothing and z_loss, by the formulas
// of core/token_loss.h. Without it a loss is the gated cross-entropy of the logits as they are.
// num_words are those of the whole vocabulary, which label smoothing has to know.
//
// k: of how many of the largest logits the gate's entropy is; 0 are all of them, without a
// selection. extra (num_extra, ...): lse, 1 or 0 for whether no logit is larger than the label's,
// and the entropy of all logits, as many of them as are asked for.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(eaft_ext, m) {
  // -> loss, nll, entropy, gate, row_max, log_sum, extra. inplace_backward is for autograd: the
  // gradient then overwrites the logits.
  m.def(
      "gated_ce_forward(Tensor logits, Tensor labels, int k, str gate, float[] gate_parameters, "
      "int ignore_index, bool inplace_backward=False, float[] family=[], int num_extra=0) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // weight * (softmax(logits) - onehot(labels)), from the row_max and log_sum of the forward; or
  // what it is in the family, whose z_loss takes the upstream gradient without the gate, too. Of a
  // shard if vocab_start is given: labels may then be in another one.
  m.def(
      "gated_ce_backward(Tensor weight, Tensor logits, Tensor labels, Tensor row_max, "
      "Tensor log_sum, int ignore_index, SymInt? vocab_start=None, SymInt? vocab_size=None, "
      "Tensor? upstream=None, float[] family=[], SymInt? num_words=None) -> Tensor");
  // The same, written over the logits.
  m.def(
      "gated_ce_backward_(Tensor weight, Tensor(a!) logits, Tensor labels, Tensor row_max, "
      "Tensor log_sum, int ignore_index, SymInt? vocab_start=None, SymInt? vocab_size=None, "
      "Tensor? upstream=None, float[] family=[], SymInt? num_words=None) -> ()");

  // The forward where the vocabulary is divided: what a shard tells the others of each row,
  // partial (..., k + 3), or more, as core/shard_partial.h has it. tells_entropy: of all logits,
  // beside that of k.
  m.def(
      "gated_ce_partial(Tensor logits, Tensor labels, int k, SymInt vocab_start, SymInt? "
      "vocab_size, int ignore_index, float[] family=[], bool tells_entropy=False) -> Tensor");
  // And what all of them, partials of all shards, make of it together.
  // -> loss, nll, entropy, gate, row_max, log_sum, extra. logits, vocab_start, vocab_size and
  // inplace_backward are for autograd. The third of the extra needs partials that tell of it.
  m.def(
      "gated_ce_merge(Tensor logits, Tensor labels, Tensor partials, int k, str gate, "
      "float[] gate_parameters, int ignore_index, SymInt vocab_start, SymInt? vocab_size, "
      "bool inplace_backward=False, float[] family=[], SymInt? num_words=None, int num_extra=0) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Both at once, a row staying on chip in between. -> loss, nll, entropy, gate, extra, and the
  // gradient of sum(upstream * loss)
  m.def(
      "gated_ce_forward_with_grad(Tensor upstream, Tensor logits, Tensor labels, int k, str gate, "
      "float[] gate_parameters, int ignore_index, float[] family=[], int num_extra=0) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The same, the gradient written over the logits. -> loss, nll, entropy, gate, extra
  m.def(
      "gated_ce_forward_with_grad_(Tensor upstream, Tensor(a!) logits, Tensor labels, int k, "
      "str gate, float[] gate_parameters, int ignore_index, float[] family=[], int num_extra=0) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // gradient *= factor, a float32 number on its device, unless that is 1: then nothing is touched,
  // and nobody waits for the device to find out. For losses that have their gradient before the
  // backward.
  m.def("scale_gradient_(Tensor(a!) gradient, Tensor factor) -> ()");

  // -> values (..., k), indices (..., k): the largest first, the lowest index first among equals
  m.def("topk(Tensor logits, int k) -> (Tensor, Tensor)");
}
