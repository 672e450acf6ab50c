#include "qat/arch/rope.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "qat/core/error.hpp"

namespace qat::arch {
namespace {

double wavelength(double theta, std::int64_t pair, std::int64_t head_dim) {
  return 2 * std::numbers::pi *
         std::pow(theta, 2 * static_cast<double>(pair) / static_cast<double>(head_dim));
}

double llama3_divisor(const Rope& rope, double length) {
  if (length < rope.original_context / rope.high_freq_factor) return 1.0;
  if (length > rope.original_context / rope.low_freq_factor) return rope.factor;
  const double smooth = (rope.original_context / length - rope.low_freq_factor) /
                        (rope.high_freq_factor - rope.low_freq_factor);
  return 1.0 / ((1.0 - smooth) / rope.factor + smooth);
}

/// The pair (as a real number) that turns `turns` times in the original context.
double pair_of_turns(const Rope& rope, double turns, double head_dim) {
  return head_dim * std::log(rope.original_context / (turns * 2 * std::numbers::pi)) /
         (2 * std::log(rope.theta));
}

double yarn_divisor(const Rope& rope, std::int64_t pair, std::int64_t head_dim) {
  const auto size = static_cast<double>(head_dim);
  const double low = std::max(std::floor(pair_of_turns(rope, rope.beta_fast, size)), 0.0);
  double high = std::min(std::ceil(pair_of_turns(rope, rope.beta_slow, size)), size - 1.0);
  if (low == high) high += 0.001;  // as transformers
  const double ramp = std::clamp((static_cast<double>(pair) - low) / (high - low), 0.0, 1.0);
  return 1.0 / (ramp / rope.factor + (1.0 - ramp));
}

/// As transformers rounds it.
std::int64_t turning_pairs(const Rope& rope, std::int64_t head_dim) {
  return static_cast<std::int64_t>(std::floor(rope.share * static_cast<double>(head_dim) / 2.0));
}

/// The last pairs do not turn, and the others are divided by one number.
Rope proportional_through(Rope rope, const std::vector<float>& divisors) {
  const auto still = [](float divisor) { return divisor >= static_cast<float>(kNoTurn); };
  const auto first = std::find_if(divisors.begin(), divisors.end(), still);
  rope.type = RopeType::kProportional;
  if (first != divisors.begin()) rope.factor = divisors.front();
  const auto turning = first - divisors.begin();
  const auto pairs = static_cast<std::int64_t>(divisors.size());
  rope.share = static_cast<double>(turning) / static_cast<double>(pairs);
  if (turning_pairs(rope, 2 * pairs) < turning) rope.share = std::nextafter(rope.share, 1.0);
  return rope;
}

bool gives(const Rope& rope, const std::vector<float>& divisors) {
  constexpr double kTolerance = 1e-6;  // converters compute the divisors in float32
  const std::vector<double> expected = rope_divisors(rope, 2 * static_cast<std::int64_t>(divisors.size()));
  return std::equal(divisors.begin(), divisors.end(), expected.begin(),
                    [](double got, double wanted) { return std::abs(got - wanted) <= kTolerance * wanted; });
}

/// The ramp in terms of the inverse wavelength, smooth = slope / length + offset, through what the file has
/// between 1 and the factor: slope = context / (high - low), offset = -low / (high - low).
std::optional<Rope> llama3_through(Rope rope, const std::vector<float>& divisors) {
  const auto count = static_cast<std::int64_t>(divisors.size());
  std::vector<std::pair<double, double>> between;  // wavelength, smooth
  double longest_kept = 0.0, shortest_divided = 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double divisor = divisors[static_cast<std::size_t>(i)];
    const double length = wavelength(rope.theta, i, 2 * count);
    if (divisor == 1.0) {
      longest_kept = length;
    } else if (divisor == rope.factor) {
      if (shortest_divided == 0.0) shortest_divided = length;
    } else {
      between.emplace_back(length, (1.0 / divisor - 1.0 / rope.factor) / (1.0 - 1.0 / rope.factor));
    }
  }
  if (between.size() > 1) {
    const auto [near, high] = between.front();
    const auto [far, low] = between.back();
    const double slope = (high - low) / (1.0 / near - 1.0 / far);
    const double offset = high - slope / near;
    rope.high_freq_factor = 1.0 - 1.0 / offset;
    rope.original_context = slope * (rope.high_freq_factor - 1.0);
  } else if (between.size() == 1) {
    // Many ramps lead through one point: as in published models, or steeper where the neighbours want it.
    const auto [length, smooth] = between.front();
    double& high = rope.high_freq_factor;
    if (shortest_divided > 0.0) high = std::min(high, (shortest_divided / length - 1.0) / smooth + 1.0);
    if (longest_kept > length * smooth) {
      high = std::min(high, length * (1.0 - smooth) / (longest_kept - length * smooth));
    }
    rope.original_context = length * (smooth * (high - 1.0) + 1.0);
  } else {  // any ramp between two neighbours
    if (longest_kept == 0.0) return std::nullopt;
    rope.high_freq_factor = std::cbrt(shortest_divided / longest_kept);
    rope.original_context = shortest_divided / rope.high_freq_factor;
  }
  const bool legal = std::isfinite(rope.original_context) && rope.original_context >= 1.0 &&
                     std::isfinite(rope.high_freq_factor) && rope.high_freq_factor > 1.0;
  return legal ? std::optional(rope) : std::nullopt;
}

}  // namespace

std::string_view to_string(RopeType type) noexcept {
  switch (type) {
    case RopeType::kDefault:
      return "default";
    case RopeType::kLinear:
      return "linear";
    case RopeType::kLlama3:
      return "llama3";
    case RopeType::kYarn:
      return "yarn";
    case RopeType::kProportional:
      return "proportional";
  }
  return "?";
}

void validate(const Rope& rope) {
  const auto fail = [](const char* key, const char* expected, double value) {
    throw ArgumentError("\"" + std::string(key) + "\": expected " + expected + ", got " +
                        std::to_string(value));
  };
  const auto positive = [&fail](const char* key, double value) {
    if (!std::isfinite(value) || value <= 0) fail(key, "a number > 0", value);
  };
  positive("rope_theta", rope.theta);
  if (rope.type == RopeType::kDefault) return;
  positive("factor", rope.factor);
  if (rope.type == RopeType::kLinear) return;
  if (rope.type == RopeType::kProportional) {
    if (rope.share >= 0.0 && rope.share <= 1.0) return;  // not for NaN
    fail("partial_rotary_factor", "a number from 0 to 1", rope.share);
  }
  positive("original_max_position_embeddings", rope.original_context);
  positive("low_freq_factor", rope.low_freq_factor);
  positive("high_freq_factor", rope.high_freq_factor);
  positive("beta_fast", rope.beta_fast);
  positive("beta_slow", rope.beta_slow);
  positive("attention_factor", rope.attention_factor);
  if (rope.type == RopeType::kLlama3 && rope.high_freq_factor <= rope.low_freq_factor) {
    fail("high_freq_factor", "more than low_freq_factor", rope.high_freq_factor);
  }
  if (rope.type == RopeType::kYarn && rope.theta == 1.0)
    fail("rope_theta", "another number than 1", rope.theta);
}

std::vector<double> rope_divisors(const Rope& rope, std::int64_t head_dim) {
  std::vector<double> divisors;
  for (std::int64_t pair = 0; pair < head_dim / 2; ++pair) {
    switch (rope.type) {
      case RopeType::kDefault:
        divisors.push_back(1.0);
        break;
      case RopeType::kLinear:
        divisors.push_back(rope.factor);
        break;
      case RopeType::kLlama3:
        divisors.push_back(llama3_divisor(rope, wavelength(rope.theta, pair, head_dim)));
        break;
      case RopeType::kYarn:
        divisors.push_back(yarn_divisor(rope, pair, head_dim));
        break;
      case RopeType::kProportional:
        divisors.push_back(pair < turning_pairs(rope, head_dim) ? rope.factor : kNoTurn);
        break;
    }
  }
  return divisors;
}

double yarn_attention_factor(double factor) {
  return factor <= 1.0 ? 1.0 : 0.1 * std::log(factor) + 1.0;
}

std::optional<Rope> rope_of_divisors(const std::vector<float>& divisors, double theta) {
  Rope rope;
  rope.theta = theta;
  if (divisors.empty() || gives(rope, divisors)) return rope;
  if (divisors.back() >= static_cast<float>(kNoTurn)) {
    const Rope part = proportional_through(rope, divisors);
    return gives(part, divisors) ? std::optional(part) : std::nullopt;
  }
  // The last pair has the longest wave: it is divided fully, or this is no scaling that is known here.
  rope.factor = divisors.back();
  if (!std::isfinite(rope.factor) || rope.factor <= 0.0) return std::nullopt;
  rope.type = RopeType::kLinear;
  if (gives(rope, divisors)) return rope;
  rope.type = RopeType::kLlama3;
  const std::optional<Rope> fitted = llama3_through(rope, divisors);
  if (!fitted) return std::nullopt;
  // Contexts are whole numbers, and the factors short ones; where that does not fit, all three move together.
  Rope whole = *fitted;
  whole.original_context = std::round(fitted->original_context);
  Rope simple = whole;
  simple.high_freq_factor = std::round(fitted->high_freq_factor * 1000.0) / 1000.0;
  if (simple.high_freq_factor > 1.0 && gives(simple, divisors)) return simple;
  whole.low_freq_factor = whole.original_context / fitted->original_context;
  whole.high_freq_factor = fitted->high_freq_factor * whole.low_freq_factor;
  return gives(whole, divisors) ? std::optional(whole) : std::nullopt;
}

}  // namespace qat::arch
