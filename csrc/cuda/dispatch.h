// From an element type, or a loss, that is known at run time to one that is known to the compiler.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "arguments.h"
#include "compiled_loss.h"

namespace eaft_ext::cuda {

// body(Element{})
template <typename Body>
cudaError_t dispatch_element(ElementType type, const Body& body) {
  switch (type) {
    case ElementType::kFloat32:
      return body(float{});
    case ElementType::kBFloat16:
      return body(__nv_bfloat16{});
    case ElementType::kFloat16:
      return body(__half{});
  }
  return cudaErrorInvalidValue;
}

// For a backward: body(Element{}, PlainLoss(loss)) or body(Element{}, FamilyLoss(loss))
template <typename Body>
cudaError_t dispatch_backward(ElementType type, const TokenLoss& loss, const Body& body) {
  return dispatch_element(type, [&](auto element) {
    return loss.is_plain() ? body(element, PlainLoss(loss)) : body(element, FamilyLoss(loss));
  });
}

// For a forward: body(Element{}, one of the three losses)
template <typename Body>
cudaError_t dispatch_forward(ElementType type, const TokenLoss& loss, const Body& body) {
  return dispatch_element(type, [&](auto element) {
    switch (compiled_loss(loss)) {
      case CompiledLoss::kPlain:
        return body(element, PlainLoss(loss));
      case CompiledLoss::kExact:
        return body(element, ExactLoss(loss));
      default:
        return body(element, FamilyLoss(loss));
    }
  });
}

}  // namespace eaft_ext::cuda
