#pragma once

// What the error of one weight is expected to cost, before any model is run.

#include <ATen/core/Tensor.h>

namespace qat::ptq {

/// The KL divergence to the float model, in nats per token, that an error E of a weight is expected to add:
///
///     1/2 sum_k tr(G_k E_k H E_k^T)
///
/// by the Kronecker-factored Fisher information (Martens & Grosse 2015, arXiv:1503.05671), the second order
/// of the divergence. Errors of several weights add up as long as they are small. errors: float32[R, N], W -
/// W^. hessian: float[N, N], E[u x x^T] of the inputs with the weights of `sensitivity`'s tokens. outputs:
/// float32[K, S, S], its curvatures, of which the last group may have less than S rows of the weight. What
/// these clip is missing: a lower bound rather than a middle. ArgumentError for other shapes;
/// NumericError for curvatures that are not finite.
double expected_kl(const at::Tensor& errors, const at::Tensor& hessian, const at::Tensor& outputs);

}  // namespace qat::ptq
