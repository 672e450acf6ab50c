// What autograd keeps is counted by tests in Python, for every shape; here the sums that a reader can check.

#include "qat/models/activations.hpp"

#include "catch.hpp"
#include "models/shapes_of_models.hpp"

using namespace qat::models;

TEST_CASE("what a llama's layer keeps per token, by hand") {
  const DecoderConfig config = llama();  // h 32, 4 heads and 2 key heads of 8, feed-forward 48
  const Forward forward{1, 1, 4, true};
  // Two norms: their inputs, 1 / RMS, their outputs. Queries and attention's output, keys and values, the
  // log-sum-exp. gate, up and their product.
  const double expected = 2 * (4 * 32 + 4 + 4 * 32) + 4 * (2 * 32 + 2 * 16) + 4 * 4 + 4 * 3 * 48;
  REQUIRE(activation_bytes(config, 0, forward) == expected);
  // The id, the final norm, and what the head reads.
  REQUIRE(outer_activation_bytes(config, forward) == 8 + 4 * 32 + 4 + 4 * 32);
  Forward plain = forward;
  plain.fused = false;  // the normed rows, and silu(gate)
  REQUIRE(activation_bytes(config, 0, plain) == expected + 2 * 4 * 32 + 4 * 48);
}

TEST_CASE("masks of a window do not grow with the sequences") {
  const DecoderConfig config = windows(3);  // windows of 5, the last layer without
  const auto bytes = [&](int64_t layer, int64_t sequences, int64_t tokens) {
    return activation_bytes(config, layer, {sequences, tokens, 4, true});
  };
  // 12 tokens: blocks of 5, 5 and 2 queries, the latter two with 9 and 6 keys.
  const double masks = 4 * (5 * 9 + 2 * 6);
  REQUIRE(2 * bytes(0, 1, 12) - bytes(0, 2, 12) == masks);
  REQUIRE(2 * bytes(2, 1, 12) - bytes(2, 2, 12) == 0);
  // The blocks' outputs are put together once more.
  REQUIRE(bytes(0, 1, 12) - masks - bytes(2, 1, 12) == 12 * 4 * 32);
  REQUIRE(bytes(0, 1, 5) == bytes(2, 1, 5));  // the window holds all
}
