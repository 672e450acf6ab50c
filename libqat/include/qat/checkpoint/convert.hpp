#pragma once

// A tensor of a checkpoint on another grid, without a change of its numbers.

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "qat/checkpoint/checkpoint.hpp"

namespace qat {

/// The same weights, bit for bit (0 and -0 count as one number), on `grid`; see qat/grid/convert.hpp for what
/// is tried. Nothing when that grid cannot hold them: `why` (unless null) then says why, naming row and
/// block. The result depends neither on the number of threads nor on anything but the tensor. ArgumentError
/// naming `key` for an unknown grid, a grid without codes, and a tensor that is not legal on its own grid.
std::optional<QuantizedTensor> convert_tensor(const std::string& key, const QuantizedTensor& tensor,
                                              std::string_view grid, std::string* why = nullptr);

/// The same on the first of `grids` that holds the tensor. `why` gets a reason for each grid tried.
std::optional<QuantizedTensor> convert_to_first(const std::string& key, const QuantizedTensor& tensor,
                                                const std::vector<std::string>& grids,
                                                std::vector<std::string>& why);

/// The checkpoint with the tensors of `grids` (state_dict key -> grid) on those grids. One that its grid
/// cannot hold stays as it was, and is in `refused` with the reason. ArgumentError for a key that is not the
/// one of a quantized tensor, and what convert_tensor throws.
QuantizedCheckpoint convert_tensors(const QuantizedCheckpoint& checkpoint,
                                    const std::map<std::string, std::string>& grids,
                                    std::map<std::string, std::string>& refused);

}  // namespace qat
