#pragma once

// What a Hugging Face folder says about generating text, beside its vocabulary: chat templates, sampling
// defaults, ends of generation.

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "qat/io/gguf.hpp"

namespace qat {

/// Adds `tokenizer.chat_template`, and `tokenizer.chat_template.<name>` with the list
/// `tokenizer.chat_templates` for further ones. They are in chat_template.jinja and
/// additional_chat_templates/<name>.jinja (transformers 5), in chat_template.json, or in
/// tokenizer_config.json as a string or a list of named templates. FileError for a template without a text.
void add_chat_templates(const std::filesystem::path& folder, const nlohmann::json& tokenizer_config,
                        io::GgufMetadata& metadata);

/// Adds `general.sampling.temp`, `.top_k`, `.top_p` and `.min_p` from a generation_config.json (null: none),
/// unless it asks for greedy decoding ("do_sample": false). FileError for values of another type.
void add_sampling_defaults(const nlohmann::json& generation_config, const std::filesystem::path& folder,
                           io::GgufMetadata& metadata);

/// Every id of `eos_token_id` in a configuration, a number or a list of them; ids beyond the vocabulary are
/// left out.
std::vector<uint32_t> end_ids(const nlohmann::json& config, int64_t vocab_size);

}  // namespace qat
