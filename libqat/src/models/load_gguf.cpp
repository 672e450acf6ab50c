#include <ATen/TensorOperators.h>

#include <memory>

#include "qat/export/gguf_model.hpp"
#include "stored_model.hpp"
#include "values.hpp"

namespace qat::models {

StoredModel open_gguf(const std::string& path) {
  const auto model = std::make_shared<const GgufModel>("load_model", path);
  StoredModel stored{path, model->config(), path, {}};
  config_of_file("load_model", path, stored.config);  // before any tensor is looked at
  for (const auto& [name, tensor] : model->tensors()) {
    // The permutation is made when the tensor is read: by then its shape has been checked.
    stored.tensors[name] = {
        tensor.stored->shape(), [model, &tensor = tensor] {
          const std::vector<int64_t> shape = tensor.stored->shape();
          const std::vector<int64_t> order = model->row_order(tensor);
          // Each value of a bias belongs to a row.
          const at::Tensor values =
              shape.size() == 1 && !order.empty()
                  ? read_ggml(tensor.stored->data, *tensor.type, {shape.front(), 1}, order).flatten()
                  : read_ggml(tensor.stored->data, *tensor.type, shape, order);
          return tensor.offset == 0.0 ? values : values - tensor.offset;
        }};
  }
  return stored;
}

}  // namespace qat::models
