// The schemas of torch.ops.libqat. Kernels register themselves in the file of their family.

#include <torch/library.h>

TORCH_LIBRARY(libqat, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  // `scales`: the learned scales, given if and only if `scale` is 'learned'; `scale_gradient` is theirs.
  m.def(
      "fake_quantize(Tensor weight, str grid, str estimator='ste', str scale='reference', str tensor='', "
      "Tensor? scales=None, str scale_gradient='lsq') -> Tensor",
      tags);
  m.def(
      "fake_quantize_backward(Tensor grad, Tensor weight, str grid, str estimator='ste', str "
      "scale='reference', str tensor='', Tensor? scales=None) -> Tensor",
      tags);
  m.def(
      "fake_quantize_backward_scales(Tensor grad, Tensor weight, Tensor scales, str grid, str "
      "estimator='ste', str scale_gradient='lsq', str tensor='') -> (Tensor grad_weight, Tensor grad_scales)",
      tags);
  m.def(
      "quantized_linear(Tensor input, Tensor weight, Tensor? bias, str grid, str estimator='ste', "
      "str scale='reference', str tensor='', Tensor? scales=None, str scale_gradient='lsq') -> Tensor",
      tags);
  // One operator per gradient: each is run only when it is needed, and none returns an undefined tensor,
  // which meta kernels and compilers do not carry. Those of weight and scales share a product.
  m.def(
      "quantized_linear_grad_input(Tensor grad_output, Tensor weight, str grid, str scale='reference', "
      "str tensor='', Tensor? scales=None) -> Tensor",
      tags);
  m.def(
      "quantized_linear_grad_weight(Tensor grad_output, Tensor input, Tensor weight, str grid, "
      "str estimator='ste', str scale='reference', str tensor='', Tensor? scales=None) -> Tensor",
      tags);
  m.def(
      "quantized_linear_grad_scales(Tensor grad_output, Tensor input, Tensor weight, Tensor scales, str "
      "grid, "
      "str estimator='ste', str scale_gradient='lsq', str tensor='') -> (Tensor grad_weight, Tensor "
      "grad_scales)",
      tags);
  m.def(
      "quantized_embedding(Tensor indices, Tensor weight, int padding_idx, str grid, str estimator='ste', "
      "str scale='reference', str tensor='', Tensor? scales=None, str scale_gradient='lsq') -> Tensor",
      tags);
  m.def(
      "quantized_embedding_backward(Tensor grad_output, Tensor indices, Tensor weight, int padding_idx, "
      "str grid, str estimator='ste', str scale='reference', str tensor='', Tensor? scales=None) -> Tensor",
      tags);
  m.def(
      "quantized_embedding_backward_scales(Tensor grad_output, Tensor indices, Tensor weight, Tensor scales, "
      "int padding_idx, str grid, str estimator='ste', str scale_gradient='lsq', str tensor='') -> (Tensor "
      "grad_weight, Tensor grad_scales)",
      tags);
  m.def(
      "quantize(Tensor weight, str grid, str scale='reference', str tensor='', Tensor? scales=None) -> "
      "(Tensor codes, Tensor scales)",
      tags);
  m.def("choose_scales(Tensor weight, str grid, str scale='search', str tensor='') -> Tensor", tags);
  // Of SEQ: F free parameters of a block -> its P scales, for the operators above.
  m.def("seq_tie(Tensor free, str grid, str tensor='') -> Tensor", tags);
  m.def("seq_tie_backward(Tensor grad, str grid, str tensor='') -> Tensor", tags);
  m.def("seq_start(Tensor weight, str grid, str scale='search', str tensor='') -> Tensor", tags);
  m.def("fake_quantize_activation(Tensor input, str format, Tensor? scale=None, str tensor='') -> Tensor",
        tags);
  m.def("fake_quantize_activation_backward(Tensor grad, Tensor input, Tensor scale, str tensor='') -> Tensor",
        tags);
  m.def(
      "fake_quantize_activation_backward_scale(Tensor grad, Tensor input, Tensor scale, str tensor='') -> "
      "(Tensor grad_input, Tensor grad_scale)",
      tags);
  m.def("dequantize(Tensor codes, Tensor scales, str grid, str tensor='') -> Tensor", tags);
}
