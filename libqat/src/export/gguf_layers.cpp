#include "export/gguf_layers.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "qat/core/error.hpp"

namespace qat {
namespace {

using Json = nlohmann::ordered_json;
using arch::PerLayer;

/// What the file says of each layer, and the configuration that says the same.
class Layers {
 public:
  Layers(const std::string& where, const io::GgufFile& file, const arch::Family& family, Json& config)
      : where_(where),
        file_(file),
        family_(family),
        config_(config),
        count_(config.at("num_hidden_layers").get<int64_t>()) {
    if (count_ < 1 || count_ > kMaxLayers) {
      throw FileError(where_ + std::string(family.gguf_architecture) + ".block_count: expected 1 to " +
                      std::to_string(kMaxLayers) + ", got " + std::to_string(count_));
    }
    first_shared_ = count_ - config.value("num_kv_shared_layers", int64_t{0});
  }

  void read() {
    // The order counts: which layers slide comes first.
    for (const arch::ConfigKey& key : family_.config) {
      if (key.per_layer == PerLayer::kSliding) read_windows(key);
      if (key.per_layer == PerLayer::kFullEvery) read_period(key);
    }
    for (const arch::ConfigKey& key : family_.config) {
      if (key.per_layer == PerLayer::kFullHeadDim) read_full_head_dim(key);
      if (key.per_layer == PerLayer::kKeyHeads) read_key_heads(key);
      if (key.per_layer == PerLayer::kFeedForward) read_feed_forward(key);
    }
    read_values();
    if (full_key_heads_) add_full_key_heads();
  }

 private:
  static constexpr int64_t kMaxLayers = 4096;

  [[noreturn]] void refuse(const std::string& key, const std::string& expected) const {
    throw UnsupportedError(where_ + key + ": expected " + expected + ", got another order");
  }

  void set_windows(const std::vector<bool>& sliding) {
    sliding_ = sliding;
    Json types = Json::array();
    for (const bool window : sliding) types.push_back(window ? "sliding_attention" : "full_attention");
    config_["layer_types"] = std::move(types);
  }

  void read_windows(const arch::ConfigKey& key) {
    const auto& sliding = file_.get<std::vector<bool>>(key.gguf);
    if (static_cast<int64_t>(sliding.size()) != count_) fail_count(key.gguf, sliding.size());
    set_windows(sliding);
  }

  void read_period(const arch::ConfigKey& key) {
    const bool given = file_.metadata().find(key.gguf) != nullptr;
    const int64_t period = given ? file_.get_integer(key.gguf) : family_.layers.full_every;
    if (period < 1)
      throw FileError(where_ + key.gguf + ": expected a period above 0, got " + std::to_string(period));
    std::vector<bool> sliding;
    for (int64_t layer = 0; layer < count_; ++layer) sliding.push_back((layer + 1) % period != 0);
    set_windows(sliding);
  }

  [[noreturn]] void fail_count(const std::string& key, std::size_t got) const {
    throw FileError(where_ + key + ": expected a value for each of " + std::to_string(count_) +
                    " layers, got " + std::to_string(got));
  }

  /// One number for all layers, or an array of one for each.
  std::vector<int64_t> numbers(const std::string& key) const {
    const io::GgufValue* value = file_.metadata().find(key);
    std::optional<std::vector<int64_t>> listed;
    if (value != nullptr) {
      std::visit(
          [&]<class T>(const T& held) {
            if constexpr (std::is_same_v<T, std::vector<int32_t>> ||
                          std::is_same_v<T, std::vector<uint32_t>>) {
              listed.emplace(held.begin(), held.end());
            }
          },
          *value);
    }
    if (!listed) return std::vector<int64_t>(static_cast<std::size_t>(count_), file_.get_integer(key));
    if (static_cast<int64_t>(listed->size()) != count_) fail_count(key, listed->size());
    return *std::move(listed);
  }

  bool slides(int64_t layer) const { return sliding_[static_cast<std::size_t>(layer)]; }

  /// The number that all layers of one kind have; nothing when there is no such layer.
  template <class Of>
  std::optional<int64_t> common(const std::string& key, const std::vector<int64_t>& all, const Of& of,
                                const char* kind) const {
    std::optional<int64_t> number;
    for (int64_t layer = 0; layer < count_; ++layer) {
      if (!of(layer)) continue;
      const int64_t here = all[static_cast<std::size_t>(layer)];
      if (number && *number != here) refuse(key, std::string("one number for all ") + kind);
      number = here;
    }
    return number;
  }

  void read_full_head_dim(const arch::ConfigKey& key) {
    const int64_t size = file_.get_integer(key.gguf);
    const std::string name(key.hf.front());
    if (config_.contains(name) && config_[name] != size) {
      throw UnsupportedError(where_ + key.gguf + ": expected " + config_[name].dump() +
                             " as the other keys of " + name + " say, got " + std::to_string(size));
    }
    config_[name] = size;
  }

  void read_key_heads(const arch::ConfigKey& key) {
    const std::vector<int64_t> all = numbers(key.gguf);
    const auto sliding =
        common(key.gguf, all, [&](int64_t layer) { return slides(layer); }, "layers with a sliding window");
    const auto full = common(
        key.gguf, all, [&](int64_t layer) { return !slides(layer); }, "layers without a sliding window");
    config_[std::string(key.hf.front())] = sliding ? *sliding : *full;
    if (sliding && full && *sliding != *full) full_key_heads_ = *full;
  }

  void read_feed_forward(const arch::ConfigKey& key) {
    const std::vector<int64_t> all = numbers(key.gguf);
    const auto own = common(
        key.gguf, all, [&](int64_t layer) { return layer < first_shared_; }, "layers with their own keys");
    const auto shared = common(
        key.gguf, all, [&](int64_t layer) { return layer >= first_shared_; }, "layers that share keys");
    if (!own) refuse(key.gguf, "layers with their own keys");
    config_[std::string(key.hf.front())] = *own;
    if (!shared || *shared == *own) return;
    if (*shared != 2 * *own) refuse(key.gguf, "layers that share keys to be as wide or twice as wide");
    config_["use_double_wide_mlp"] = true;
  }

  /// Files lack v_proj where values are the keys.
  void read_values() {
    for (const arch::TensorRule& rule : family_.tensors) {
      if (rule.where != arch::Where::kOwnValues) continue;
      for (int64_t layer = 0; layer < first_shared_; ++layer) {
        std::string name(rule.gguf);
        name.replace(name.find("{i}"), 3, std::to_string(layer));
        if (!slides(layer) && file_.find_tensor(name) == nullptr) config_["attention_k_eq_v"] = true;
      }
    }
  }

  /// transformers reads the flat field only for models whose values are their keys.
  void add_full_key_heads() {
    if (config_.value("attention_k_eq_v", false)) {
      config_["num_global_key_value_heads"] = *full_key_heads_;
      return;
    }
    for (int64_t layer = 0; layer < count_; ++layer) {
      if (slides(layer)) continue;
      Json& differs = config_["per_layer_config"][std::to_string(layer)];
      if (config_.contains("global_head_dim")) differs["head_dim"] = config_["global_head_dim"];
      differs["num_key_value_heads"] = *full_key_heads_;
    }
  }

  const std::string& where_;
  const io::GgufFile& file_;
  const arch::Family& family_;
  Json& config_;
  int64_t count_;
  int64_t first_shared_ = 0;
  std::vector<bool> sliding_;
  std::optional<int64_t> full_key_heads_;
};

}  // namespace

void read_gguf_layers(const std::string& where, const io::GgufFile& file, const arch::Family& family,
                      Json& config) {
  if (family.sliding_rope) Layers(where, file, family, config).read();
}

}  // namespace qat
