#pragma once

// A checkpoint's configuration, read through the family's table.

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "qat/arch/family.hpp"
#include "qat/arch/rope.hpp"
#include "qat/io/gguf.hpp"

namespace qat {

class ModelConfig {
 public:
  /// `text`: the checkpoint's configuration. ArgumentError when it is empty, not JSON, or without
  /// `model_type`; UnsupportedError for a family that is not known and for a rotary embedding that GGUF
  /// cannot describe.
  explicit ModelConfig(const std::string& text);

  const arch::Family& family() const noexcept { return *family_; }
  int64_t vocab_size() const { return integer("vocab_size"); }
  int64_t layers() const { return integer("num_hidden_layers"); }
  int64_t query_heads() const { return integer("num_attention_heads"); }
  int64_t key_heads() const;
  /// The last part of `_name_or_path`, or "".
  std::string name() const;

  /// The architecture's keys, in the order of its table. ArgumentError naming the configuration key that is
  /// missing or of another type.
  io::GgufMetadata gguf_keys() const;

  /// The divisor of each rotary frequency, [D / 2], for rope type "llama3"; else empty.
  std::vector<float> rope_divisors() const;

 private:
  /// The first of the dotted paths that the configuration has; null when none.
  const nlohmann::json& find(const std::vector<std::string_view>& paths) const;
  const nlohmann::json& find(std::string_view path) const;
  int64_t integer(std::string_view path) const;
  int64_t head_dim() const;
  void read_rope();
  void add_rope_scaling(io::GgufMetadata& keys) const;
  nlohmann::json value_of(const arch::ConfigKey& key) const;

  std::shared_ptr<const nlohmann::json> root_;
  const arch::Family* family_ = nullptr;
  arch::Rope rope_;
};

}  // namespace qat
