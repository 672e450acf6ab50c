#include "qat/models/activations.hpp"

#include <algorithm>

namespace qat::models {
namespace {

/// Bytes of a number of the residual stream, and of what norms see: float32.
constexpr double kWide = 4.0;
/// Bytes of a token's id or an index.
constexpr double kIndex = 8.0;

/// A norm of one row besides its input: 1 / RMS, and in plain operators the normed row.
double norm_bytes(double width, const Forward& forward) {
  return kWide + (forward.fused ? 0.0 : kWide * width);
}

/// What one layer keeps, operation by operation as the modules of this folder call them. Legend: h hidden
/// size, c bytes of the compute dtype.
class LayerActivations {
 public:
  LayerActivations(const DecoderConfig& config, int64_t layer, const Forward& forward)
      : config_(config),
        layer_(config.layer(layer)),
        forward_(forward),
        c_(static_cast<double>(forward.compute_bytes)),
        h_(static_cast<double>(config.hidden_size)),
        heads_(static_cast<double>(config.num_attention_heads)),
        key_heads_(layer_.kv_source == layer ? static_cast<double>(layer_.num_key_value_heads) : 0.0),
        dim_(static_cast<double>(layer_.head_dim)) {}

  double bytes() const {
    const double per_token = attention() + feed_forward() + layer_input() + experts();
    return static_cast<double>(forward_.sequences * forward_.tokens) * per_token + masks();
  }

 private:
  double norm(double width) const { return norm_bytes(width, forward_); }

  bool in_blocks() const { return layer_.window > 0 && layer_.window < forward_.tokens; }

  bool in_float32() const { return c_ == kWide; }

  /// A norm behind a branch keeps what the branch gives, widened.
  double branch_norm() const { return kWide * h_ + norm(h_); }

  /// A norm in front of products: its input is the residual stream, its output theirs.
  double input_norm() const { return kWide * h_ + norm(h_) + c_ * h_; }

  double head_norms(double heads) const { return heads * (kWide * dim_ + norm(dim_)); }

  /// The norm of values has no weight, so that plain operators need not keep the normed row. In float32,
  /// values that are the keys are kept once for both norms.
  double value_norm() const {
    const bool kept_with_keys = !layer_.has_value && config_.qk_norm && in_float32();
    return key_heads_ * (kWide + (kept_with_keys ? 0.0 : kWide * dim_));
  }

  double attention() const {
    const double queries = heads_ * dim_, keys = key_heads_ * dim_;
    double sum = input_norm();
    if (config_.qk_norm) sum += head_norms(heads_) + head_norms(key_heads_);
    if (config_.v_norm) sum += value_norm();
    // Queries, keys and values as attention reads them, its output, and the log-sum-exp of each row.
    sum += c_ * (2.0 * queries + 2.0 * keys) + kWide * heads_;
    if (in_blocks()) sum += c_ * queries;  // the blocks' outputs are put together
    return config_.branch_norms ? sum + branch_norm() : sum;
  }

  /// Of each block of queries behind the first, for all sequences at once.
  double masks() const {
    double sum = 0.0;
    if (!in_blocks()) return sum;
    for (int64_t begin = layer_.window; begin < forward_.tokens; begin += layer_.window) {
      const int64_t rows = std::min(layer_.window, forward_.tokens - begin);
      sum += c_ * static_cast<double>(rows * (rows + layer_.window - 1));
    }
    return sum;
  }

  /// gate and up, their product, and in plain operators f(gate).
  double gated(double width) const { return c_ * width * (forward_.fused ? 3.0 : 4.0); }

  double feed_forward() const {
    const double sum = input_norm() + gated(static_cast<double>(layer_.intermediate_size));
    return config_.branch_norms ? sum + branch_norm() : sum;
  }

  double layer_input() const {
    const auto width = static_cast<double>(config_.per_layer_input.size);
    if (width == 0.0) return 0.0;
    return c_ * h_ + gated(width) + branch_norm();  // the gate reads the residual stream itself
  }

  double experts() const {
    const auto count = static_cast<double>(config_.experts.count);
    if (count == 0.0) return 0.0;
    const auto chosen = static_cast<double>(config_.experts.per_token);
    const auto width = static_cast<double>(config_.experts.intermediate_size);
    // Scores and their softmax read the normed stream twice; a choice is an index, its probability, its
    // share of the chosen, and its expert's scale.
    const double router = kWide + 2.0 * kWide * h_ + kWide * (count + 1.0) + chosen * (kIndex + 3.0 * kWide);
    // A row in, between, and out, its weight, and where it stands when rows are sorted by expert.
    const double each = c_ * h_ + gated(width) + c_ * h_ + kWide + 2.0 * kIndex;
    // The experts' norm reads the stream that the dense branch keeps; both branches have a norm behind them.
    return router + chosen * each + norm(h_) + 2.0 * branch_norm();
  }

  const DecoderConfig& config_;
  const LayerConfig layer_;
  const Forward forward_;
  double c_, h_, heads_, key_heads_, dim_;
};

}  // namespace

double activation_bytes(const DecoderConfig& config, int64_t layer, const Forward& forward) {
  return LayerActivations(config, layer, forward).bytes();
}

double outer_activation_bytes(const DecoderConfig& config, const Forward& forward) {
  const auto hidden = static_cast<double>(config.hidden_size), c = static_cast<double>(forward.compute_bytes);
  double per_token = kIndex + kWide * hidden + norm_bytes(hidden, forward) + c * hidden;
  if (const auto size = static_cast<double>(config.per_layer_input.size); size > 0.0) {
    // The projection's input, which in float32 is the first layer's, and a norm for each layer.
    if (c != kWide) per_token += c * hidden;
    per_token += static_cast<double>(config.num_hidden_layers) * (kWide * size + norm_bytes(size, forward));
  }
  return static_cast<double>(forward.sequences * forward.tokens) * per_token;
}

}  // namespace qat::models
