#include "export/hf_files.hpp"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "export/input_file.hpp"
#include "qat/core/error.hpp"
#include "qat/io/atomic_file.hpp"

namespace qat {
namespace {

using std::filesystem::path;

/// What transformers' tokenizers and processors write, old and new.
constexpr const char* kTokenizerFiles[] = {"tokenizer.json",
                                           "tokenizer_config.json",
                                           "special_tokens_map.json",
                                           "added_tokens.json",
                                           "vocab.json",
                                           "vocab.txt",
                                           "merges.txt",
                                           "tokenizer.model",
                                           "spiece.model",
                                           "sentencepiece.bpe.model",
                                           "chat_template.jinja",
                                           "chat_template.json",
                                           "preprocessor_config.json",
                                           "processor_config.json",
                                           "generation_config.json"};
constexpr const char* kTemplates = "additional_chat_templates";

void copy_text(const path& from, const path& to) {
  io::write_file_atomically(to, read_text(from));
}

path source_folder(const std::string& source) {
  if (source.empty()) {
    throw ArgumentError(
        "export_checkpoint: tokenizer_from: expected a Hugging Face directory, a tokenizer.json or \"none\" "
        "(--tokenizer-from), got nothing, and the checkpoint names no tokenizer");
  }
  if (std::filesystem::is_directory(source)) return source;
  if (!std::filesystem::is_regular_file(source)) {
    throw FileError(
        "export_checkpoint: tokenizer_from: expected a Hugging Face directory or a tokenizer.json, got "
        "nothing at " +
        source + "; name another with tokenizer_from (--tokenizer-from)");
  }
  if (is_gguf(source)) {
    throw UnsupportedError(
        "export_checkpoint: tokenizer_from: " + source +
        ": expected a Hugging Face directory, a tokenizer.json or \"none\", got a GGUF (libqat's "
        "Python package and command line convert its tokenizer)");
  }
  return path(source).parent_path();
}

struct GridSummary {
  int64_t tensors = 0, blocks = 0, changed = 0;
};

std::map<std::string, GridSummary> by_grid(const std::vector<Requantization>& report) {
  std::map<std::string, GridSummary> grids;
  for (const Requantization& row : report) {
    GridSummary& sum = grids[row.grid];
    ++sum.tensors;
    sum.blocks += row.blocks;
    sum.changed += row.changed_blocks;
  }
  return grids;
}

}  // namespace

std::vector<std::string> copy_tokenizer_files(const std::string& source, const path& target) {
  if (source == "none") return {};
  const path folder = source_folder(source);
  std::vector<std::string> copied;
  for (const char* name : kTokenizerFiles) {
    if (!std::filesystem::is_regular_file(folder / name)) continue;
    copy_text(folder / name, target / name);
    copied.emplace_back(name);
  }
  if (!std::filesystem::is_directory(folder / kTemplates)) return copied;
  std::filesystem::create_directory(target / kTemplates);
  for (const auto& entry : std::filesystem::directory_iterator(folder / kTemplates)) {
    if (entry.path().extension() != ".jinja") continue;
    const path name = path(kTemplates) / entry.path().filename();
    copy_text(entry.path(), target / name);
    copied.push_back(name.string());
  }
  return copied;
}

bool HfWeights::requantizes_exactly() const {
  return std::all_of(report.begin(), report.end(), [](const Requantization& row) { return row.exact(); });
}

bool HfWeights::is_exact() const {
  return rounded_floats.empty() && std::all_of(report.begin(), report.end(), [](const Requantization& row) {
           return row.rounded_weights == 0;
         });
}

std::string requantization_summary(const HfWeights& weights) {
  int64_t blocks = 0, changed = 0, tensors = 0;
  for (const Requantization& row : weights.report) {
    blocks += row.blocks;
    changed += row.changed_blocks;
    tensors += row.exact() ? 0 : 1;
  }
  if (tensors == 0) return "exact";
  return std::to_string(changed) + " of " + std::to_string(blocks) + " blocks change, in " +
         std::to_string(tensors) + " of " + std::to_string(weights.report.size()) + " tensors";
}

std::string hf_readme(const std::string& name, const HfWeights& weights) {
  std::string text = "# " + (name.empty() ? std::string("Model") : name) +
                     "\n\nThe weights of a libqat checkpoint, dequantized and written as " +
                     std::string(weights.dtype->name) + ". ";
  text += weights.is_exact() ? "Every number is exactly the one that was trained.\n"
                             : "Some numbers are rounded to that type; the checkpoint holds them exactly.\n";
  text +=
      "\nQuantized again by each grid's own rule, these weights give the codes and scales that were "
      "trained: " +
      requantization_summary(weights) +
      ".\n\n| grid | tensors | blocks | blocks that change |\n|---|---|---|---|\n";
  for (const auto& [grid, sum] : by_grid(weights.report)) {
    text += "| " + grid + " | " + std::to_string(sum.tensors) + " | " + std::to_string(sum.blocks) + " | " +
            std::to_string(sum.changed) + " |\n";
  }
  return text + "\n`" + kManifest + "` lists each tensor.\n";
}

nlohmann::ordered_json hf_manifest(const HfWeights& weights) {
  nlohmann::ordered_json tensors = nlohmann::ordered_json::object();
  for (const Requantization& row : weights.report) {
    tensors[row.tensor] = {{"grid", row.grid},
                           {"blocks", row.blocks},
                           {"changed_blocks", row.changed_blocks},
                           {"weights", row.weights},
                           {"rounded_weights", row.rounded_weights}};
  }
  return {{"format", 1},
          {"target", "hf"},
          {"dtype", weights.dtype->name},
          {"exact", weights.is_exact()},
          {"requantizes_exactly", weights.requantizes_exactly()},
          {"rounded_floats", weights.rounded_floats},
          {"tensors", tensors}};
}

void require_free(const path& folder, bool overwrite) {
  const auto refuse = [&folder](const std::string& got) {
    throw FileError("export_checkpoint: " + folder.string() +
                    ": expected no folder there, or an empty one, got " + got);
  };
  std::error_code ignored;
  if (!std::filesystem::exists(folder, ignored)) return;
  if (!std::filesystem::is_directory(folder)) refuse("a file");
  if (std::filesystem::is_empty(folder)) return;
  if (!std::filesystem::is_regular_file(folder / kManifest)) refuse("a folder with other files");
  if (!overwrite) refuse("an earlier export (replace it with overwrite, --overwrite)");
  std::set<std::string> known{kManifest};
  const nlohmann::json manifest = read_json(folder / kManifest);
  for (const auto& file : field(manifest, "files")) {
    if (file.is_string()) known.insert(file.get<std::string>());
  }
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
    const std::string name = entry.path().lexically_relative(folder).string();
    if (!entry.is_directory() && !known.contains(name))
      refuse("an earlier export with another file in it, " + name);
  }
}

}  // namespace qat
