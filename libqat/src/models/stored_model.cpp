#include "stored_model.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>

#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "qat/core/error.hpp"
#include "qat/nn/without_initialization.hpp"

namespace qat::models {
namespace {

constexpr const char* kEmbedding = "model.embed_tokens.weight";
constexpr const char* kHead = "lm_head.weight";

/// transformers ties what it is told to tie only if the file does not say otherwise: equal numbers are one
/// tensor, different ones are an untied model whose config is wrong.
void resolve_head(StoredModel& stored, DecoderConfig& config) {
  const auto head = stored.tensors.find(kHead);
  const auto embedding = stored.tensors.find(kEmbedding);
  if (!config.tie_word_embeddings || head == stored.tensors.end() || embedding == stored.tensors.end())
    return;
  if (head->second.shape == embedding->second.shape &&
      at::equal(head->second.read(), embedding->second.read())) {
    stored.tensors.erase(head);
    return;
  }
  config.tie_word_embeddings = false;
  auto json = nlohmann::ordered_json::parse(stored.config);
  json["tie_word_embeddings"] = false;
  stored.config = json.dump(2);
}

std::string to_string(at::IntArrayRef shape) {
  std::ostringstream text;
  text << shape;
  return text.str();
}

/// Weights of a decoder; in double, because the sizes of a broken config may overflow.
double weight_count(const DecoderConfig& config) {
  const double hidden = static_cast<double>(config.hidden_size);
  const double heads = static_cast<double>(2 * config.num_attention_heads + 2 * config.num_key_value_heads);
  const double layer = hidden * (heads * static_cast<double>(config.head_dim) +
                                 3.0 * static_cast<double>(config.intermediate_size) + 2.0);
  const double embedding = hidden * static_cast<double>(config.vocab_size);
  return layer * static_cast<double>(config.num_hidden_layers) +
         embedding * (config.tie_word_embeddings ? 1.0 : 2.0) + hidden;
}

/// A broken config must not allocate what the file cannot fill. Models below `kAlwaysFine` pass, so that
/// their missing tensors are listed by name.
void check_size(const char* function, const StoredModel& stored, const DecoderConfig& config) {
  constexpr double kAlwaysFine = 1e7;
  double there = 0.0;
  for (const auto& [name, tensor] : stored.tensors) {
    double count = 1.0;
    for (const int64_t size : tensor.shape) count *= static_cast<double>(size);
    there += count;
  }
  const double expected = weight_count(config);
  if (expected <= kAlwaysFine || expected <= 2.0 * there) return;
  std::ostringstream text;
  text << function << ": " << stored.path << ": expected " << expected
       << " weights as its configuration says, got " << there;
  throw FileError(text.str());
}

using Parameters = torch::OrderedDict<std::string, at::Tensor>;

/// "missing a, b; misshapen c [2, 3] instead of [3, 2]; unknown d", or "" when all fits.
std::string misfits(const Parameters& parameters, const std::map<std::string, StoredTensor>& tensors) {
  std::string missing, misshapen, unknown;
  const auto add = [](std::string& list, const std::string& item) {
    list += (list.empty() ? " " : ", ") + item;
  };
  std::set<std::string> known;
  for (const auto& parameter : parameters) {
    known.insert(parameter.key());
    const auto found = tensors.find(parameter.key());
    if (found == tensors.end()) {
      add(missing, parameter.key());
    } else if (parameter.value().sizes() != at::IntArrayRef(found->second.shape)) {
      add(misshapen, parameter.key() + " " + to_string(found->second.shape) + " instead of " +
                         to_string(parameter.value().sizes()));
    }
  }
  for (const auto& [name, tensor] : tensors) {
    if (known.count(name) == 0) add(unknown, name);
  }
  std::string text;
  for (const auto& [label, list] :
       {std::pair("missing", missing), std::pair("misshapen", misshapen), std::pair("unknown", unknown)}) {
    if (!list.empty()) text += (text.empty() ? "" : "; ") + std::string(label) + list;
  }
  return text;
}

}  // namespace

DecoderConfig config_of_file(const char* function, const std::string& path, const std::string& json) {
  const std::string prefix = std::string(function) + ": " + path + ": ";
  try {
    return config_from_json(json);
  } catch (const UnsupportedError& error) {
    throw UnsupportedError(prefix + error.what());
  } catch (const ArgumentError& error) {
    throw FileError(prefix + error.what());
  }
}

LoadedModel assemble(const char* function, StoredModel stored) {
  DecoderConfig config = config_of_file(function, stored.path, stored.config);
  check_size(function, stored, config);
  resolve_head(stored, config);
  const nn::WithoutInitialization to_be_read;
  auto decoder = std::make_shared<Decoder>(config);
  auto parameters = decoder->named_parameters();
  const std::string wrong = misfits(parameters, stored.tensors);
  if (!wrong.empty()) {
    throw FileError(std::string(function) + ": " + stored.path +
                    ": expected the tensors of its configuration, got " + wrong);
  }
  const at::NoGradGuard no_grad;
  for (auto& parameter : parameters) {
    parameter.value().set_data(stored.tensors.at(parameter.key()).read());
  }
  return {std::move(decoder), std::move(stored.config), std::move(stored.tokenizer)};
}

}  // namespace qat::models
