#include "qat/grid/ggml.hpp"

#include "qat/grid/mxfp4.hpp"
#include "qat/grid/nvfp4.hpp"
#include "qat/grid/offset_block.hpp"
#include "qat/grid/q1_0.hpp"
#include "qat/grid/q2_0.hpp"
#include "qat/grid/q2_k.hpp"
#include "qat/grid/q3_k.hpp"
#include "qat/grid/q4_k.hpp"
#include "qat/grid/q6_k.hpp"
#include "qat/grid/q8_0.hpp"
#include "qat/grid/signed_block.hpp"
#include "qat/grid/tq1_0.hpp"
#include "qat/grid/tq2_0.hpp"

namespace qat::grid {
namespace {

template <class Codec>
constexpr int kParams = [] {
  int total = 0;
  for (const Field& field : Codec::kInfo.fields) total += field.count;
  return total;
}();

/// Weights that ggml packs at once: those that share scales, or several such groups.
template <class Codec>
constexpr int64_t kWeights = [] {
  if constexpr (requires { Codec::kPackedBlock; }) {
    return Codec::kPackedBlock;
  } else {
    return Codec::kInfo.block;
  }
}();

template <class Codec>
constexpr int64_t kScales = kWeights<Codec> / Codec::kInfo.block * kParams<Codec>;

template <class Codec>
void pack(const int8_t* codes, const float* stored, int64_t n, uint8_t* bytes) {
  for (int64_t b = 0; b < n / kWeights<Codec>; ++b) {
    Codec::pack_block(codes + b * kWeights<Codec>, stored + b * kScales<Codec>,
                      bytes + b * Codec::kBlockBytes);
  }
}

template <class Codec>
void unpack(const uint8_t* bytes, int64_t n, int8_t* codes, float* stored) {
  for (int64_t b = 0; b < n / kWeights<Codec>; ++b) {
    Codec::unpack_block(bytes + b * Codec::kBlockBytes, codes + b * kWeights<Codec>,
                        stored + b * kScales<Codec>);
  }
}

template <class Codec>
constexpr GgmlType blocks(uint32_t id, std::string_view name, uint32_t file_type) {
  return {id,        name,        Codec::kInfo.name, kWeights<Codec>, Codec::kBlockBytes,
          file_type, pack<Codec>, unpack<Codec>};
}

constexpr GgmlType kTypes[] = {
    {0, "F32", "f32", 1, 4, 0, nullptr, nullptr},
    {1, "F16", "f16", 1, 2, 1, nullptr, nullptr},
    {30, "BF16", "bf16", 1, 2, 32, nullptr, nullptr},
    blocks<Q4_0>(2, "Q4_0", 2),
    blocks<Q4_1>(3, "Q4_1", 3),
    blocks<Q5_0>(6, "Q5_0", 8),
    blocks<Q5_1>(7, "Q5_1", 9),
    blocks<Q8_0>(8, "Q8_0", 7),
    // llama.cpp has a file type for each recipe of a K-quant; "small" has the least of other types.
    blocks<Q2_K>(10, "Q2_K", 10),
    blocks<Q3_K>(11, "Q3_K", 11),
    blocks<Q4_K>(12, "Q4_K", 14),
    blocks<Q5_K>(13, "Q5_K", 16),
    blocks<Q6_K>(14, "Q6_K", 18),
    blocks<TQ1_0>(34, "TQ1_0", 36),
    blocks<TQ2_0>(35, "TQ2_0", 37),
    blocks<Mxfp4>(39, "MXFP4", 38),
    blocks<Nvfp4>(40, "NVFP4", 39),
    blocks<Q1_0>(41, "Q1_0", 40),
    blocks<Q2_0>(42, "Q2_0", 41),
};

}  // namespace

const GgmlType* ggml_type(uint32_t id) noexcept {
  for (const GgmlType& type : kTypes) {
    if (type.id == id) return &type;
  }
  return nullptr;
}

const GgmlType* ggml_type_of_grid(std::string_view grid) noexcept {
  for (const GgmlType& type : kTypes) {
    if (type.grid == grid) return &type;
  }
  return nullptr;
}

}  // namespace qat::grid
