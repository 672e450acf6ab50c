#include "train/run_state.hpp"

#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include <charconv>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <utility>

#include "checkpoint/dtype.hpp"
#include "qat/core/error.hpp"
#include "qat/io/safetensors.hpp"

namespace qat::train {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kFormatKey = "libqat.state";
constexpr const char* kFormat = "1";
constexpr const char* kStepKey = "libqat.step";
constexpr const char* kRunKey = "libqat.run";

[[noreturn]] void fail(const std::string& path, const std::string& subject, const std::string& expected,
                       const std::string& got) {
  throw FileError("Trainer: " + path + ": " + subject + ": expected " + expected + ", got " + got);
}

io::Dtype file_dtype(const StateTensor& tensor) {
  const std::optional<io::Dtype> dtype = checkpoint::file_dtype(tensor.value.scalar_type());
  if (dtype) return *dtype;
  throw UnsupportedError("Trainer: " + tensor.key + ": expected a float, integer or bool tensor, got " +
                         c10::toString(tensor.value.scalar_type()));
}

io::ByteProducer bytes_of(const at::Tensor& tensor) {
  return [tensor](const io::ByteSink& sink) {
    const at::Tensor dense = tensor.detach().cpu().contiguous();
    sink({static_cast<const std::byte*>(dense.const_data_ptr()), dense.nbytes()});
  };
}

std::string hex(std::uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

std::string describe(io::Dtype dtype, at::IntArrayRef shape) {
  std::ostringstream out;
  out << io::to_string(dtype) << shape;
  return out.str();
}

/// The first difference between the runs, in words.
void check_identity(const std::string& path, const std::string& saved, const RunIdentity& identity) {
  const Json ours = Json::parse(identity.to_json());
  const Json theirs = Json::parse(saved, nullptr, false);
  if (!theirs.is_object() || !theirs.contains("options") || !theirs["options"].is_object()) {
    fail(path, "metadata", "the description of a run", saved.substr(0, 60));
  }
  for (const auto& [name, value] : ours["options"].items()) {
    if (name == "eval_every" || name == "save_every") continue;
    const Json other = theirs["options"].value(name, Json());
    if (other != value) fail(path, "saved by another run: " + name, value.dump(), other.dump());
  }
  for (const char* name : {"policy", "text", "teacher"}) {
    const Json mine = ours.value(name, Json()), other = theirs.value(name, Json());
    if (other != mine) fail(path, std::string("saved by another run: ") + name, mine.dump(), other.dump());
  }
}

const std::string& metadata(const io::SafetensorsFile& file, const std::string& key) {
  const auto entry = file.metadata().find(key);
  if (entry == file.metadata().end()) fail(file.path().string(), "metadata", "the key " + key, "none");
  return entry->second;
}

int64_t read_step(const io::SafetensorsFile& file, int64_t steps) {
  const std::string& text = metadata(file, kStepKey);
  int64_t step = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), step);
  if (error != std::errc() || end != text.data() + text.size() || step < 0 || step > steps) {
    fail(file.path().string(), "step", "0 to " + std::to_string(steps), "\"" + text + "\"");
  }
  return step;
}

void check_run(const io::SafetensorsFile& file, const RunIdentity& identity) {
  const std::string path = file.path().string();
  if (metadata(file, kFormatKey) != kFormat) {
    fail(path, "state format", kFormat, metadata(file, kFormatKey));
  }
  check_identity(path, metadata(file, kRunKey), identity);
}

void check_tensors(const io::SafetensorsFile& file, const std::vector<StateTensor>& tensors) {
  const std::string path = file.path().string();
  for (const StateTensor& tensor : tensors) {
    const io::SafetensorsTensor& saved = file.at(tensor.key);
    const std::string expected = describe(file_dtype(tensor), tensor.value.sizes());
    const std::string got = describe(saved.dtype, saved.shape);
    if (got != expected) fail(path, tensor.key, expected, got);
  }
  if (file.tensors().size() != tensors.size()) {
    fail(path, "tensors", std::to_string(tensors.size()), std::to_string(file.tensors().size()));
  }
}

}  // namespace

std::string RunIdentity::to_json() const {
  Json json;
  json["options"] = Json::parse(train::to_json(options));
  json["policy"] = Json::parse(policy);
  json["text"] = hex(text);
  if (teacher_top_k > 0) json["teacher"] = {{"top_k", teacher_top_k}, {"fingerprint", hex(teacher)}};
  return json.dump();
}

void save_state(const std::string& path, const std::vector<StateTensor>& tensors, int64_t step,
                const RunIdentity& identity) {
  std::vector<io::SafetensorsEntry> entries;
  for (const StateTensor& tensor : tensors) {
    entries.push_back({tensor.key, file_dtype(tensor), tensor.value.sizes().vec(), bytes_of(tensor.value)});
  }
  io::write_safetensors(
      path, entries,
      {{kFormatKey, kFormat}, {kStepKey, std::to_string(step)}, {kRunKey, identity.to_json()}});
}

int64_t read_state_step(const std::string& path, const RunIdentity& identity) {
  const io::SafetensorsFile file(path);
  check_run(file, identity);
  return read_step(file, identity.options.steps);
}

int64_t load_state(const std::string& path, const std::vector<StateTensor>& tensors,
                   const RunIdentity& identity) {
  const io::SafetensorsFile file(path);
  check_run(file, identity);
  check_tensors(file, tensors);
  const int64_t step = read_step(file, identity.options.steps);
  const c10::NoGradGuard no_grad;
  for (const StateTensor& tensor : tensors) {
    const io::SafetensorsTensor& saved = file.at(tensor.key);
    at::Tensor dense = at::empty(tensor.value.sizes(), at::TensorOptions(tensor.value.scalar_type()));
    if (!saved.data.empty()) std::memcpy(dense.mutable_data_ptr(), saved.data.data(), saved.data.size());
    at::Tensor(tensor.value).copy_(dense);
  }
  return step;
}

}  // namespace qat::train
