#pragma once

// A grid is what a file can store: levels, blocks, the encoding of scales, and the rounding. This folder is
// the only place that knows a number format; fake-quantization, checkpoints and every exporter call it.
//
// A grid is four functions on one row of float32 weights w[n] (n = everything after dimension 0):
//
//     choose(w)        -> s        the consumer's own scale rule, in unrounded float32
//     store(s)         -> s'       what the file can hold of s (for example rounded to fp16)
//     encode(w, s)     -> codes    the consumer's own rounding to integer codes
//     decode(codes, s')-> w_hat    what the consumer computes from the file, in float32
//
// A learned scale replaces `choose` and passes through the other three. Whether codes are picked with s or
// with s' is the grid's own business (Q4_0 encodes with s and decodes with s'). A fifth,
// `search(w) -> s`, finds better scales than the consumer's rule does, in the same bytes.
//
// Names used below: n weights in a row, B weights in a block, P scale parameters per block.
//   w, w_hat: float32[n] | s, s': float32[n / B, P] | codes: int8[n]

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "qat/core/scheme.hpp"

namespace qat::grid {

/// Storage type of one scale parameter, or of a float grid's values. kE8M0 (a power of two, OCP MX) and kE4M3
/// (OCP FP8, "fn") are stored as their byte; their s' is the float32 value of that byte.
enum class DType { kF32, kF16, kBF16, kU8, kI8, kE8M0, kE4M3 };

/// `Info::block` of grids with one scale per row (per output channel).
inline constexpr int64_t kWholeRow = 0;
/// `Info::block` of grids with one scale per tensor: callers pass the whole tensor as a single row.
inline constexpr int64_t kWholeTensor = -1;
/// An upper bound of P over all grids.
inline constexpr int kMaxParams = 36;

/// One named group of stored scale parameters of a block. A checkpoint holds it as `<tensor>.<name>`.
struct Field {
  std::string_view name;  ///< "scales", "mins", ...
  int count;              ///< parameters of this name per block
  DType dtype;            ///< the type in which the file stores them; every s' is exact in it
};

/// What a grid is, without its arithmetic.
struct Info {
  std::string_view name;          ///< the consumer's own name: "q4_0", "int4_channel", ...
  int bits;                       ///< width of one stored code (or of one value, for float grids)
  int64_t block;                  ///< weights that share their scale parameters, kWholeRow or kWholeTensor
  int code_min;                   ///< least legal code
  int code_max;                   ///< greatest legal code
  std::span<const Field> fields;  ///< stored scale parameters; empty for float grids
  bool is_float;                  ///< f32, f16, bf16: no codes and no scales, values are rounded as they are
  DType dtype;                    ///< float grids: the type of the stored value; otherwise unused
};

/// Outcome of a row function. A caller turns it into a NumericError that names tensor and row.
enum class Status {
  kOk,
  kNotFinite,  ///< the row holds a NaN or an infinity
  kOverflow,   ///< a scale (or a float grid's value) exceeds what its stored type can hold
};

/// "is not finite" or "has a value or scale beyond its stored type", for messages.
std::string_view to_string(Status status) noexcept;

/// A number format. Immutable and safe to share between threads; obtained from `find`.
class Grid {
 public:
  virtual ~Grid() = default;

  /// The constants of the format.
  virtual const Info& info() const noexcept = 0;

  /// B for a row of n weights: `info().block`, or n for kWholeRow and kWholeTensor.
  int64_t block(int64_t n) const noexcept { return info().block > 0 ? info().block : n; }
  /// Blocks in a row of n weights; 0 for float grids. n must be divisible (see `divides`).
  int64_t blocks(int64_t n) const noexcept { return info().is_float || n == 0 ? 0 : n / block(n); }
  /// P, the scale parameters per block.
  int params() const noexcept;
  /// Rows of scales of a tensor with that many rows of weights: 1 where the whole tensor is a single block,
  /// whose scale every row is encoded and decoded with.
  int64_t scale_rows(int64_t rows) const noexcept { return info().block == kWholeTensor ? 1 : rows; }
  /// True when a row of n weights can be stored in this grid.
  bool divides(int64_t n) const noexcept { return n > 0 && n % block(n) == 0; }

  // Float grids have no scales and no codes: their choose only checks w, in_range is 1 everywhere, and store,
  // encode and decode do nothing; fake_quantize is what rounds.

  /// The consumer's scale rule. w: float32[n] -> s: float32[n / B, P].
  virtual Status choose(const float* w, int64_t n, float* s) const = 0;
  /// Scales whose decoded weights have a smaller squared error in each block than those of `choose`, or the
  /// same error. Grids that cannot do better return what `choose` does.
  virtual Status search(const float* w, int64_t n, float* s) const = 0;
  /// `search` for kSearch, else `choose`. Learned scales are the caller's.
  Status scales(ScaleRule rule, const float* w, int64_t n, float* s) const {
    return rule == ScaleRule::kSearch ? search(w, n, s) : choose(w, n, s);
  }
  /// What the file holds of s. What it holds is stored as itself, bit for bit, so that `store` also tells
  /// whether parameters from a file are legal. s, stored: float32[n / B, P]; may alias. kOverflow when out of
  /// range, kNotFinite for a NaN. Integer parameters (zero points, sub-scales) are rounded half to even and
  /// clamped, so that they can be learned.
  virtual Status store(const float* s, int64_t n, float* stored) const = 0;
  /// The consumer's rounding. w: float32[n], s: the unstored scales -> codes: int8[n], all legal.
  virtual void encode(const float* w, int64_t n, const float* s, int8_t* codes) const = 0;
  /// What the consumer computes. codes: int8[n], stored: float32[n / B, P] -> w_hat: float32[n].
  virtual void decode(const int8_t* codes, int64_t n, const float* stored, float* w_hat) const = 0;
  /// mask[i] = 1 where w[i] lies inside the representable range of scales s (code_min <= w/s + z <= code_max,
  /// before rounding), else 0. A scale of 0 puts everything inside. The borders are widened by 2^-20 of
  /// themselves, so that rounding never puts the weight that a scale was chosen from outside. For clipped
  /// estimators.
  virtual void in_range(const float* w, int64_t n, const float* s, uint8_t* mask) const = 0;

  /// scales, store, encode and decode in one pass, equal to the four calls bit for bit; vectorised where the
  /// CPU allows. w and w_hat: float32[n], may alias. On an error w_hat is unspecified.
  virtual Status fake_quantize(const float* w, int64_t n, float* w_hat,
                               ScaleRule rule = ScaleRule::kReference) const = 0;
  /// The same, each w_hat then rounded to bfloat16 (nearest even) for a bf16 matmul; w_hat: bf16 bits[n].
  virtual Status fake_quantize_bf16(const float* w, int64_t n, uint16_t* w_hat,
                                    ScaleRule rule = ScaleRule::kReference) const = 0;

  // The same with scales that the caller holds, float32[n / B, P] as `choose` gives them, of any sign where
  // the decoder allows it (elsewhere `store` takes what is negative for the least scale). kNotFinite also for
  // a NaN among the scales, kOverflow where one is infinite or too large. Float grids, which have no scales,
  // round as they do and let every gradient pass.

  /// store, encode and decode in one pass, equal to the three calls bit for bit. w and w_hat may alias.
  virtual Status fake_quantize_with(const float* w, int64_t n, const float* s, float* w_hat) const = 0;
  /// See `fake_quantize_bf16`.
  virtual Status fake_quantize_bf16_with(const float* w, int64_t n, const float* s,
                                         uint16_t* w_hat) const = 0;
  /// dL/dw and dL/ds from g = dL/dw_hat, for w_hat = fake_quantize_with(w, s), the storing of s passed
  /// straight through (its rounding, its clamping, and the rounding of products to a compute type). With
  /// level = what the stored scale s' is multiplied with (a code, a code less its zero point, a value of
  /// e2m1), position = the weight's place among the levels before rounding, and e = level - position:
  ///   grad_w[i] = g[i] * (the estimator's factor of w[i], see EstimatorKind; e in steps between levels)
  ///   grad_s of a scale:     sum of g[i] * (inside ? e : level) over its weights (LSQ); q1_0: * level always
  ///   of an additive offset: sum of g[i] * (inside ? 0 : 1) (LSQ+); of a zero point: that times -s'
  ///   of the two levels of a K-quant: the same by the chain rule through their product.
  /// Inside is as in `in_range`. A scale of 0 has no gradient: all its weights are at position and level 0.
  /// kReference's and kSearch's gradients of w are those for the scales that the rule gives. Fast and scalar
  /// path agree bit for bit. grad_w: float32[n], may alias g; grad_s: float32[n / B, P]; either may be null.
  /// s: not read by kSte where grad_s is null. On an error the outputs are unspecified.
  virtual Status backward(const float* w, int64_t n, const float* s, const float* g, EstimatorKind kind,
                          float* grad_w, float* grad_s) const = 0;
  /// Whether `choose_backward` is defined: the scale rules of the K-quants are searches, those of mxfp4 and
  /// nvfp4 round.
  virtual bool rule_has_gradient() const noexcept = 0;
  /// kDifferentiated: grad_w[i] += sum over the row's scales of grad_s * ds/dw[i], s = choose(w): the terms
  /// of the weights that determine a scale (the block's largest, or its least and largest; the first of
  /// equals). Throws UnsupportedError where `rule_has_gradient()` is false.
  virtual Status choose_backward(const float* w, int64_t n, const float* grad_s, float* grad_w) const = 0;
};

/// The grid of that name: one of `names()`, or `NAME[@SCALE_GRID][:DEQUANT_DTYPE]` where `name_options(NAME)`
/// has those options. Options with their default value may be written or left out; `info().name` leaves them
/// out. Throws ArgumentError that lists what is legal. Safe to call from any thread.
const Grid& find(std::string_view name);

/// The same grid, computed only by its scalar codec: what the vectorised path of `find` is tested against.
const Grid& reference(std::string_view name);

/// Every grid's name without options, float grids first, in a fixed order.
std::vector<std::string_view> names();

/// What is wrong with a name, in the words of an error message: "expected <expected>, got <got>".
struct BadName {
  std::string expected;
  std::string got;
};

/// Nothing when `find` knows the name.
std::optional<BadName> bad_name(std::string_view name);

/// The values that the options of a name may have, default first; empty where it has no such option.
struct NameOptions {
  /// What scales are rounded to: "fp32" (as they are), "fp16", "bf16", "bf16_fp16" (exact in both) or "pow2".
  std::span<const std::string_view> scale_grids;
  /// The consumer's compute type, to which products of code and scale are rounded: "fp32", "fp16" or "bf16".
  std::span<const std::string_view> dequant_dtypes;
};

/// The options of a name of `names()`; none for any other.
NameOptions name_options(std::string_view name);

/// `name` with those options, none where a value is empty: "int4_g32", "bf16", "" -> "int4_g32@bf16". Spelled
/// only: `find` checks it.
std::string with_options(std::string_view name, std::string_view scale_grid, std::string_view dequant_dtype);

/// Bytes of one value of that type.
int64_t dtype_bytes(DType dtype) noexcept;

/// Bytes that one row of n weights takes in the consumer's file: ggml's blocks, or packed codes (row padded
/// to a byte) plus the stored scales of its own.
int64_t row_bytes(const Grid& grid, int64_t n) noexcept;

/// Bytes of a tensor of that many rows: those of its rows, and of a scale that they all share.
int64_t tensor_bytes(const Grid& grid, int64_t rows, int64_t n) noexcept;

}  // namespace qat::grid
