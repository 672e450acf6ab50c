#include "train/run_folder.hpp"

#include <filesystem>
#include <system_error>
#include <utility>

#include "qat/core/error.hpp"
#include "qat/io/atomic_file.hpp"

namespace qat::train {
namespace {

constexpr const char* kState = "state.safetensors";

}  // namespace

RunFolder::RunFolder(std::string path)
    : path_(std::move(path)), telemetry_(path_.empty() ? "" : file("telemetry.jsonl")) {}

std::string RunFolder::file(const char* name) const {
  return (std::filesystem::path(path_) / name).string();
}

void RunFolder::begin(const RunIdentity& identity) {
  if (path_.empty()) return;
  std::error_code error;
  std::filesystem::create_directories(path_, error);
  if (error) throw FileError("Trainer: " + path_ + ": expected a folder, got: " + error.message());
  if (std::filesystem::exists(file(kState))) {
    throw FileError("Trainer: " + path_ +
                    ": expected a folder without a run, got the state of one: resume it, or choose another "
                    "folder");
  }
  io::write_file_atomically(file("run.json"), identity.to_json() + "\n");
  telemetry_.keep_until(0);
}

std::string RunFolder::state_file() const {
  if (path_.empty()) throw FileError("Trainer: resume: expected a run folder, got a run that is not saved");
  if (!std::filesystem::exists(file(kState))) {
    throw FileError("Trainer: " + path_ +
                    ": expected the state of a run to resume, got none: start it without "
                    "resuming");
  }
  return file(kState);
}

int64_t RunFolder::saved_step(const RunIdentity& identity) const {
  return read_state_step(state_file(), identity);
}

int64_t RunFolder::resume(const std::vector<StateTensor>& tensors, const RunIdentity& identity) {
  const int64_t step = load_state(state_file(), tensors, identity);
  telemetry_.keep_until(step);
  return step;
}

void RunFolder::save(const std::vector<StateTensor>& tensors, int64_t step, const RunIdentity& identity) {
  if (!path_.empty()) save_state(file(kState), tensors, step, identity);
}

}  // namespace qat::train
