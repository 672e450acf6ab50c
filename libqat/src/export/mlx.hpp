#pragma once

// Folders of MLX (mlx-lm), mode "affine":
//
// 1. `M.weight` U32 [R, N * bits / 32]: the levels 0 .. 2^bits - 1 of a row as one stream of bits, least
//    significant first, in little-endian words.
// 2. `M.scales`, `M.biases` [R, N / g] in F32, F16 or BF16, which is also the type of MLX's arithmetic.
// 3. config.json, `quantization`: {"group_size", "bits", "mode"}, and the same under the path of each module
//    that differs; repeated as `quantization_config`.
// 4. Unquantized tensors in their own type, under their own name.
// (mlx/ops.cpp affine_quantize, mlx_lm/utils.py load_model)

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "export/fitting.hpp"
#include "export/hf_plan.hpp"

namespace qat {

/// "mlx4_g64@bf16" and the like.
bool is_mlx_grid(std::string_view grid) noexcept;

/// The folder's tensors, on grids of MLX.
struct MlxPlan {
  Fitted fitted;
  std::vector<HfTensor> tensors;
};

MlxPlan plan_mlx(const QuantizedCheckpoint& checkpoint);

/// The model's configuration as mlx-lm reads it, without `quantization`: its classes know `rope_theta` and
/// `rope_scaling` at the top only, and some take a missing `tie_word_embeddings` for true.
nlohmann::ordered_json mlx_config(const MlxPlan& plan);

/// Whether config.json describes a quantization in MLX's way.
bool is_mlx_folder(const std::filesystem::path& path);
QuantizedCheckpoint read_mlx(const std::string& path);
std::vector<Difference> verify_mlx(const std::string& path, const QuantizedCheckpoint& checkpoint);

}  // namespace qat
