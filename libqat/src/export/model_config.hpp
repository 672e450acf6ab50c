#pragma once

// A checkpoint's configuration, read through the family's table.

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "qat/arch/family.hpp"
#include "qat/arch/layers.hpp"
#include "qat/io/gguf.hpp"

namespace qat {

class ModelConfig {
 public:
  /// `text`: the checkpoint's configuration; that of a model with more than text is read from its
  /// `text_config`. ArgumentError when it is empty, not JSON, or without `model_type`, and naming the key for
  /// values that make no model; UnsupportedError for a family that is not known, and naming the key for what
  /// GGUF cannot say.
  explicit ModelConfig(const std::string& text);

  const arch::Family& family() const noexcept { return *family_; }
  const arch::ModelShape& shape() const noexcept { return shape_; }
  int64_t vocab_size() const { return integer("vocab_size"); }
  /// Goes on with a vocabulary of the first `rows` tokens.
  void cut_vocabulary(int64_t rows);
  int64_t layers() const { return static_cast<int64_t>(shape_.layers.size()); }
  int64_t query_heads() const { return integer("num_attention_heads"); }
  int64_t key_heads() const;
  /// The last part of `_name_or_path`, or "".
  const std::string& name() const noexcept { return name_; }

  /// The architecture's keys, in the order of its table. ArgumentError naming the configuration key that is
  /// missing or of another type.
  io::GgufMetadata gguf_keys() const;

  /// The divisor of each rotary frequency of the layers that attend to all positions, [D / 2], where the
  /// family's files hold them; else empty.
  std::vector<float> rope_divisors() const;

 private:
  /// The first of the dotted paths that the configuration has; null when none.
  const nlohmann::json& find(const std::vector<std::string_view>& paths) const;
  const nlohmann::json& find(std::string_view path) const;
  int64_t integer(std::string_view path) const;
  int64_t head_dim() const;
  void check_ropes() const;
  void check_implied() const;
  void check_layers() const;
  void add_rope_scaling(io::GgufMetadata& keys) const;
  nlohmann::json value_of(const arch::ConfigKey& key) const;
  std::optional<io::GgufValue> per_layer(const arch::ConfigKey& key) const;

  std::string name_;
  std::shared_ptr<const nlohmann::json> decoder_;  ///< the object that describes the decoder
  const arch::Family* family_ = nullptr;
  arch::ModelShape shape_;
  arch::Ropes ropes_;
};

}  // namespace qat
