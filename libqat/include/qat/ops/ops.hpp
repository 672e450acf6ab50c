#pragma once

// Tensors in, tensors out. Every function here calls a dispatcher operator of the same name
// (`torch.ops.libqat.*`). Each has CPU and meta kernels, a reference for every other device composed of the
// same operators, an autograd rule whose backward is made of operators of their own, and, where it computes
// in a lower precision, an autocast rule (inputs go to the autocast type, latents stay float32).
//
// Legend: R rows (dimension 0 of a weight), N weights in a row (everything after dimension 0), G grid blocks
// in a row, P scale parameters per block, T tokens (all leading dimensions of an input), I in and O out
// features.
//
// Every function of a weight takes `scales`, the learned scales float32[R, G, P] ([1, 1, P] where the whole
// tensor shares them): unstored, of any sign where the decoder allows it. They are given if and only if the
// scale rule is kLearned and the grid has scales; ArgumentError otherwise. UnsupportedError for
// kDifferentiated on a grid whose scale rule has no gradient (K-quants, mxfp4, nvfp4).
//
// Every function takes `tensor`, the weight's name, for messages only. Errors: ArgumentError for shapes,
// dtypes, unknown grids and widths the block does not divide; NumericError naming tensor and row for NaN,
// infinity or a scale beyond its stored type. Differentiating a backward operator (double backward) raises
// c10::Error ("derivative for libqat::... is not implemented").

#include "qat/ops/activation.hpp"
#include "qat/ops/fake_quantize.hpp"
#include "qat/ops/quantize.hpp"
#include "qat/ops/quantized_embedding.hpp"
#include "qat/ops/quantized_linear.hpp"
#include "qat/ops/seq.hpp"
