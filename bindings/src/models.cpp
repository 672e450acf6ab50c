#include "module.hpp"

#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <torch/csrc/utils/pybind.h>

#include <filesystem>
#include <optional>

#include "qat/models/activations.hpp"
#include "qat/models/generate.hpp"
#include "qat/models/load.hpp"
#include "qat/models/shapes.hpp"
#include "qat/ops/sample.hpp"

namespace py = pybind11;

namespace qat::python {
namespace {

using models::Decoder;
using models::LoadedModel;

py::dict parameters(Decoder& decoder) {
  py::dict result;
  for (const auto& item : decoder.named_parameters()) result[py::str(item.key())] = item.value();
  return result;
}

py::dict buffers(Decoder& decoder) {
  py::dict result;
  for (const auto& item : decoder.named_buffers()) result[py::str(item.key())] = item.value();
  return result;
}

at::Tensor forward(Decoder& decoder, const at::Tensor& tokens, models::KvCache* cache) {
  return cache == nullptr ? decoder.forward(tokens) : decoder.forward(tokens, *cache);
}

py::list shapes(const std::string& config) {
  py::list result;
  for (const models::TensorShape& tensor : models::parameter_shapes(models::config_from_json(config))) {
    result.append(py::make_tuple(tensor.name, py::tuple(py::cast(tensor.shape)),
                                 std::string(to_string(tensor.kind)), tensor.buffer));
  }
  return result;
}

std::pair<double, std::vector<double>> activations(const std::string& config, int64_t sequences,
                                                   int64_t tokens, int64_t compute_bytes, bool fused) {
  const models::DecoderConfig parsed = models::config_from_json(config);
  const models::Forward forward{sequences, tokens, compute_bytes, fused};
  std::vector<double> layers;
  for (int64_t i = 0; i < parsed.num_hidden_layers; ++i) {
    layers.push_back(models::activation_bytes(parsed, i, forward));
  }
  return {models::outer_activation_bytes(parsed, forward), layers};
}

void set_trainable(Decoder& decoder, bool trainable) {
  for (at::Tensor& parameter : decoder.parameters()) parameter.set_requires_grad(trainable);
}

/// The library's `generate`; Ctrl-C and what the progress function raises end it.
at::Tensor generate(Decoder& decoder, int64_t count, int64_t window, const at::Tensor& first,
                    std::optional<int64_t> beginning, int64_t seed, const py::object& progress) {
  models::GenerateOptions options{.beginning = beginning, .seed = seed};
  options.progress = [&progress](int64_t done, int64_t total) {
    const py::gil_scoped_acquire locked;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(done, total, "writing text");
  };
  const py::gil_scoped_release unlocked;
  return models::generate(decoder, count, window, first, options);
}

void bind_generate(py::module_& module) {
  module.def("generate", &generate, py::arg("decoder"), py::arg("count"), py::arg("window"), py::arg("first"),
             py::kw_only(), py::arg("beginning") = py::none(), py::arg("seed") = 0,
             py::arg("progress") = py::none(),
             R"(`count` texts that the decoder writes, each a sample at temperature 1: int64[count, window].

first: int64[n], ids of which each text's first token is drawn evenly, so that the texts are not all of the
likeliest kind. beginning: a token that stands before it, see `libqat.beginning_of_text`. The same seed gives the
same text where the logits are the same bits. Computes in autocast's dtype or the decoder's own. progress: called with
(tokens, of tokens, "writing text").

ArgumentError unless count and window are positive and there are ids in `first`; NumericError for logits that are not
finite.)");
  module.def("sample", &qat::sample, py::arg("logits"), py::arg("uniform"),
             py::call_guard<py::gil_scoped_release>(),
             R"(An id for each row of logits[n, V] with its probability, int64[n].

uniform: float64[n], evenly drawn from [0, 1): one number a row, where multinomial draws one for each id. ArgumentError
for other shapes and dtypes; NumericError for logits that are not finite.)");
  module.def(
      "mixed", &models::mixed, py::arg("parts"), py::arg("seed") = 0,
      "Windows of several sources, each int64[n, T], in one order without a pattern, so that each batch has "
      "some of all. A single source stays as it is.");
}

void bind_cache(py::module_& module) {
  using models::KvCache;
  py::class_<KvCache>(module, "KvCache", "Keys and values of the tokens that a Decoder has seen.")
      .def_property_readonly("length", &KvCache::length, "Tokens of each sequence that passed so far.")
      .def_property_readonly("nbytes", &KvCache::bytes, "Bytes of the tensors held.")
      .def("clear", &KvCache::clear, "Forgets all tokens.");
}

void bind_decoder(py::module_& module) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<Decoder, std::shared_ptr<Decoder>>(module, "Decoder",
                                                "libqat's own decoder. Runs in autocast's "
                                                "dtype when autocast is on, else in the weights'.")
      .def("__call__", &forward, py::arg("tokens"), py::arg("cache") = nullptr, unlocked)
      .def(
          "forward", &forward, py::arg("tokens"), py::arg("cache") = nullptr, unlocked,
          "tokens: int64[B, T] -> logits [B, T, V]. With a cache, of tokens that follow those in it, without "
          "gradients: a prompt first, then one token at a time. ArgumentError for ids outside the "
          "vocabulary.")
      .def(
          "new_cache", [](const Decoder& decoder) { return models::KvCache(decoder.config()); },
          "An empty KvCache for this decoder.")
      .def("hidden", &Decoder::hidden, py::arg("tokens"), unlocked,
           "tokens: int64[B, T] -> [B, T, h] after the final norm; `head` makes logits of it.")
      .def("head", &Decoder::head, py::arg("hidden"), unlocked, "hidden: [..., h] -> logits [..., V].")
      .def("frozen_copy", &Decoder::frozen_copy, py::arg("dtype"), unlocked,
           "A copy without gradients and quantizers, matrices stored in `dtype`: a teacher.")
      .def(
          "parameters", &parameters,
          "name -> parameter, with Hugging Face's names. The tensors are the latents themselves, not copies.")
      .def("buffers", &buffers, "name -> tensor of the state that is not trained (\"...layer_scalar\").")
      .def("set_trainable", &set_trainable, py::arg("trainable"),
           "Whether every parameter asks for a gradient; single ones by "
           "`parameters()[name].requires_grad_()`.");
}

}  // namespace

void bind_models(py::module_& module) {
  bind_cache(module);
  bind_decoder(module);
  bind_generate(module);
  py::class_<LoadedModel>(module, "LoadedModel", "A model as it was found on disk.")
      .def_readonly("decoder", &LoadedModel::decoder, "The Decoder, with float32 latents.")
      .def_readonly("config", &LoadedModel::config, "JSON in Hugging Face's spelling.")
      .def_readonly("tokenizer", &LoadedModel::tokenizer,
                    "Path to take the tokenizer from: the GGUF itself, or the Hugging Face folder.");
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  using Path = std::filesystem::path;
  module.def(
      "load_model", [](const Path& path) { return models::load_model(path.string()); }, py::arg("path"),
      unlocked,
      "Reads a Hugging Face folder (config.json and safetensors) or a GGUF file into a LoadedModel. "
      "FileError "
      "listing every missing, unknown or misshapen tensor; UnsupportedError for what the decoder lacks.");
  module.def(
      "parameter_shapes", &shapes, py::arg("config"),
      "config: the text of a config.json -> (name, shape, kind of layer, whether a buffer) of each tensor "
      "of its decoder, without memory for any.");
  module.def(
      "activation_bytes", &activations, py::arg("config"), py::arg("sequences"), py::arg("tokens"),
      py::arg("compute_bytes"), py::arg("fused"),
      "Bytes that the decoder of `config` (the text of a config.json) keeps between forward and backward: "
      "(outside the layers, [of each layer]). fused: by libqat's row kernels, on a CPU, or by LibTorch's "
      "operators.");
  module.def(
      "load_checkpoint", [](const Path& path) { return models::load_checkpoint(path.string()); },
      py::arg("path"), unlocked,
      "The decoder with the dequantized numbers of a *.qat.safetensors, for scoring what ships.");
}

}  // namespace qat::python
