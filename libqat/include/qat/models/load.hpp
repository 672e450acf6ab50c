#pragma once

// Decoders from files. Weights arrive as float32 latents; names are Hugging Face's, whatever the file calls
// them.

#include <memory>
#include <string>

#include "qat/models/decoder.hpp"

namespace qat::models {

/// A model as it was found on disk.
struct LoadedModel {
  std::shared_ptr<Decoder> decoder;  ///< float32 latents
  std::string config;                ///< JSON in Hugging Face's spelling (made from the metadata for a GGUF)
  std::string tokenizer;  ///< path to take the tokenizer from: the GGUF itself, or the HF directory
};

/// `path`: an HF directory (config.json and safetensors, F32, F16 or BF16, or codes and scales that
/// `import_checkpoint` reads), or a GGUF file whose tensors are on grids of `grid/` (q and k rows are brought
/// back to Hugging Face's order). What is coded arrives dequantized; `take_up` gives its scales back. A head
/// that is stored beside tied embeddings stays tied when its numbers are equal; otherwise the model is
/// untied, in `config` too, as transformers does. FileError that lists every missing, extra or misshapen
/// tensor; UnsupportedError naming the key or tensor for what the decoder cannot compute.
LoadedModel load_model(const std::string& path);

/// The decoder with the numbers of a checkpoint (`*.qat.safetensors`, dequantized), for scoring what ships:
/// activations are rounded by its static scales, which any `prepare` ends.
LoadedModel load_checkpoint(const std::string& path);

}  // namespace qat::models
