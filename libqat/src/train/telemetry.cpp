#include "train/telemetry.hpp"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "qat/core/error.hpp"
#include "qat/io/atomic_file.hpp"

namespace qat::train {
namespace {

using Json = nlohmann::ordered_json;

Json to_json(const eval::Score& score) {
  return {{"tokens", score.tokens},
          {"nll", score.nll},
          {"perplexity", score.perplexity()},
          {"kl", score.kl},
          {"top1", score.top1}};
}

}  // namespace

std::string to_json(const StepReport& report) {
  Json json = {{"step", report.step},
               {"steps", report.steps},
               {"loss", report.loss},
               {"learning_rate", report.learning_rate},
               {"gradient_norm", report.gradient_norm},
               {"tokens_per_second", report.tokens_per_second},
               {"seconds_left", report.seconds_left}};
  const std::pair<const char*, double> measured[] = {{"flip_rate", report.flip_rate},
                                                     {"oscillation", report.oscillation},
                                                     {"clip_rate", report.clip_rate},
                                                     {"scale_drift", report.scale_drift},
                                                     {"distance_to_grid", report.distance_to_grid},
                                                     {"probe_kl", report.probe_kl},
                                                     {"probe_kl_start", report.probe_kl_start}};
  for (const auto& [name, value] : measured) {
    if (value >= 0) json[name] = value;
  }
  if (!report.dead_codes.empty()) json["dead_codes"] = report.dead_codes;
  if (!report.evaluation.empty()) {
    json["evaluation"]["student"] = to_json(report.evaluation.back());
    if (report.evaluation.size() > 1) json["evaluation"]["teacher"] = to_json(report.evaluation.front());
  }
  return json.dump();
}

Telemetry::Telemetry(std::string path) : path_(std::move(path)) {}

void Telemetry::keep_until(int64_t step) {
  if (path_.empty()) return;
  std::string kept, line;
  std::ifstream in(path_);
  while (std::getline(in, line)) {
    const Json json = Json::parse(line, nullptr, false);
    const bool ours = json.is_object() && json.contains("step") && json["step"].is_number_integer();
    if (ours && json["step"].get<int64_t>() <= step) kept += line + '\n';
  }
  in.close();
  io::write_file_atomically(path_, kept);
}

void Telemetry::append(const StepReport& report) {
  if (path_.empty()) return;
  std::ofstream out(path_, std::ios::app);
  out << train::to_json(report) << '\n' << std::flush;
  if (!out) {
    throw FileError("Trainer: " + path_ + ": expected to append a line, got " + std::strerror(errno));
  }
}

}  // namespace qat::train
