#pragma once

// A module's weights from and to files, by name: what `state_dict` is in Python. No TorchScript is involved:
// the module is your own class, and the names are those it registered its parameters and buffers under.

#include <torch/nn/module.h>

#include <string>

#include "qat/checkpoint/checkpoint.hpp"

namespace qat {

/// Copies tensors into the module's parameters and buffers, in place. `path`: a safetensors file (such as
/// `safetensors.torch.save_file(model.state_dict(), path)` writes), a folder with `model.safetensors` or its
/// shards, or a libqat checkpoint, which is dequantized: the module then computes with the numbers that ship.
/// Names and shapes must agree exactly, except that of tied names one is enough. Floats are converted to the
/// module's float type, integers and bools must have the module's. FileError listing every tensor that is
/// missing, extra or does not fit; nothing is changed then.
void load_state(torch::nn::Module& module, const std::string& path);

/// The same from a checkpoint in memory. Its aliases may name what the module does not have. ArgumentError.
void load_state(torch::nn::Module& module, const QuantizedCheckpoint& checkpoint);

/// Writes parameters and buffers as a safetensors file by atomic rename, tied tensors once, under their first
/// name. ArgumentError for a type that the format lacks, FileError for the disk.
void save_state(const torch::nn::Module& module, const std::string& path);

}  // namespace qat
