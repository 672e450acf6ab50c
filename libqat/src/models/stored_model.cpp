#include "stored_model.hpp"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>

#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "qat/arch/family.hpp"
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

/// Parameters and buffers of a decoder, as files name them.
using Members = std::vector<std::pair<std::string, at::Tensor>>;

Members members_of(const Decoder& decoder) {
  Members members;
  for (const auto& item : decoder.named_parameters()) members.emplace_back(item.key(), item.value());
  for (const auto& item : decoder.named_buffers()) members.emplace_back(item.key(), item.value());
  return members;
}

/// Files may carry keys and values for layers that read those of another layer.
void drop_dead(StoredModel& stored, const DecoderConfig& config) {
  const arch::Family& family = arch::find_by_model_type(config.model_type);
  std::erase_if(stored.tensors, [&](const auto& item) {
    const auto mapped = arch::hf_to_gguf(family, item.first);
    if (!mapped || !mapped->layer || *mapped->layer >= config.num_hidden_layers) return false;
    const arch::Where where = mapped->rule->where;
    return (where == arch::Where::kOwnKeys || where == arch::Where::kOwnValues) &&
           config.layer(*mapped->layer).kv_source != *mapped->layer;
  });
}

/// "missing a, b; misshapen c [2, 3] instead of [3, 2]; unknown d", or "" when all fits.
std::string misfits(const Members& members, const std::map<std::string, StoredTensor>& tensors) {
  std::string missing, misshapen, unknown;
  const auto add = [](std::string& list, const std::string& item) {
    list += (list.empty() ? " " : ", ") + item;
  };
  std::set<std::string> known;
  for (const auto& [name, member] : members) {
    known.insert(name);
    const auto found = tensors.find(name);
    if (found == tensors.end()) {
      add(missing, name);
    } else if (member.sizes() != at::IntArrayRef(found->second.shape)) {
      add(misshapen,
          name + " " + to_string(found->second.shape) + " instead of " + to_string(member.sizes()));
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
  drop_dead(stored, config);
  resolve_head(stored, config);
  const nn::WithoutInitialization to_be_read;
  auto decoder = std::make_shared<Decoder>(config);
  const Members members = members_of(*decoder);
  const std::string wrong = misfits(members, stored.tensors);
  if (!wrong.empty()) {
    throw FileError(std::string(function) + ": " + stored.path +
                    ": expected the tensors of its configuration, got " + wrong);
  }
  const at::NoGradGuard no_grad;
  for (const auto& [name, member] : members) member.set_data(stored.tensors.at(name).read());
  return {std::move(decoder), std::move(stored.config), std::move(stored.tokenizer)};
}

}  // namespace qat::models
