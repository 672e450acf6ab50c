#include <ATen/Parallel.h>

#include <algorithm>
#include <span>
#include <vector>

#include "qat/train/teacher_cache.hpp"
#include "train/checksum.hpp"
#include "train/permutation.hpp"

namespace qat::train {
namespace {

/// Hashed by one thread, so that the result does not depend on how many there are.
constexpr int64_t kPieceBytes = int64_t{1} << 20;

std::uint64_t hash(std::string_view text, std::uint64_t state) {
  return checksum(std::as_bytes(std::span(text)), mix(state ^ text.size()));
}

std::uint64_t hash(const at::Tensor& tensor, std::uint64_t state) {
  state = hash(c10::toString(tensor.scalar_type()), state);
  for (const int64_t size : tensor.sizes()) state = mix(state ^ static_cast<std::uint64_t>(size));
  const at::Tensor dense = tensor.detach().cpu().contiguous();
  const auto* data = static_cast<const std::byte*>(dense.const_data_ptr());
  const auto bytes = static_cast<int64_t>(dense.nbytes());
  std::vector<std::uint64_t> pieces(static_cast<std::size_t>((bytes + kPieceBytes - 1) / kPieceBytes));
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * kPieceBytes;
      const auto count = static_cast<std::size_t>(std::min(kPieceBytes, bytes - at));
      pieces[static_cast<std::size_t>(i)] = checksum({data + at, count});
    }
  });
  return checksum(std::as_bytes(std::span(pieces)), state);
}

}  // namespace

std::uint64_t fingerprint(const torch::nn::Module& module, std::string_view also) {
  std::uint64_t state = hash(also, 0);
  const auto add = [&](const auto& tensors) {
    for (const auto& item : tensors) state = hash(item.value(), hash(item.key(), state));
  };
  add(module.named_parameters());
  add(module.named_buffers());
  return state;
}

}  // namespace qat::train
