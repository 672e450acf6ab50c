#pragma once

// What the tests of training share: the settings and the text of a run that takes milliseconds.

#include <fstream>
#include <functional>
#include <iterator>
#include <string>

#include "qat/core/error.hpp"
#include "qat/train/options.hpp"
#include "qat/train/token_data.hpp"
#include "train/tiny_model.hpp"

/// 12 steps of 2 sequences of 8 tokens, saved after steps 5 and 10, measured every fourth.
inline qat::train::Options tiny_options() {
  qat::train::Options options;
  options.steps = 12;
  options.batch_size = 2;
  options.sequence_length = 8;
  options.learning_rate = 1e-2;
  options.compute_dtype = "float32";
  options.save_every = 5;
  options.telemetry_every = 4;
  return options;
}

inline qat::train::TokenData tiny_data(int64_t tokens = 400) {
  return qat::train::TokenData::from_tensor(tiny_tokens(tokens), kTinyVocabulary);
}

inline std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

/// What an error of that type says, or "accepted".
template <class Error = qat::FileError>
std::string message(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}
