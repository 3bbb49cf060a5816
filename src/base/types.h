// The words that every layer shares: element types and views of memory. Views own nothing.
#pragma once

#include <bit>
#include <cstdint>
#include <string>

namespace larosa {

/// Element types of stored tensors. Arithmetic is float32 throughout; these are storage. int8 and int4 are
/// lines of scaled integers (base/quant.h); u8 is how a file names their bytes.
enum class DType { f32, f16, bf16, f64, u8, int8, int4 };

constexpr bool quantised(DType t) {
  return t == DType::int8 || t == DType::int4;
}
/// Bytes of one element of a type that has elements (not int8, int4: these come in lines).
constexpr int64_t dtype_size(DType t) {
  return t == DType::f64 ? 8 : t == DType::f32 ? 4 : t == DType::u8 ? 1 : 2;
}
/// Bytes of n values that lie together, with scales and padding where the type has them.
int64_t line_bytes(DType t, int64_t n);
/// "f32", "f16", "bf16", "f64", "u8", "int8", "int4": the name in flags, logs and tables.
constexpr const char* dtype_name(DType t) {
  switch (t) {
    case DType::f32:
      return "f32";
    case DType::f16:
      return "f16";
    case DType::bf16:
      return "bf16";
    case DType::f64:
      return "f64";
    case DType::u8:
      return "u8";
    case DType::int8:
      return "int8";
    case DType::int4:
      return "int4";
  }
  return "?";
}

/// The type of that name; CHECKs that there is one (flags are validated where they are read).
DType dtype_of(const std::string& name);
/// What adapters, heads and tables are stored in beside projections of type t. int8 costs them nothing that
/// can be measured (adapters: with their leading channels in float32, model.h), int4 does.
constexpr DType companion(DType t) {
  return quantised(t) ? DType::int8 : t;
}

/// What a gated feed-forward makes of gate z and up u: a(z) · u. `relu` with a threshold is FATReLU
/// (ProSparse, arXiv 2402.13516). A NaN stays one.
struct Activation {
  enum Kind {
    silu,   // z / (1 + e^−z)
    relu,   // z above the threshold, else 0
    relu2,  // max(0, z)²
    drelu   // max(0, z), and u becomes max(0, u): TurboSparse, arXiv 2406.05955
  };
  Kind kind = silu;
  float threshold = 0;  // ≥ 0, of relu

  /// a(z) is exactly zero for many z: these neurons need neither up nor down.
  bool rests() const { return kind != silu; }
  bool operator==(const Activation&) const = default;
};

/// A view of float32 rows in backend memory. // (rows, cols), rows `stride` elements apart
struct Mat {
  float* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;

  Mat() = default;
  Mat(float* d, int64_t r, int64_t c) : data(d), rows(r), cols(c), stride(c) {}
  Mat(float* d, int64_t r, int64_t c, int64_t s) : data(d), rows(r), cols(c), stride(s) {}
  float* row(int64_t t) const { return data + t * stride; }
  /// Rows [first, first + count).
  Mat slice(int64_t first, int64_t count) const { return Mat(data + first * stride, count, cols, stride); }
};

/// How a weight lies in memory. `rows`: (out, in), one output's inputs are contiguous, as Hugging Face stores
/// it. `channels`: (in, out), one input channel's outputs are contiguous, so that a dropped channel is never
/// read. Scales of quantised lines run along them: over outputs, or over inputs in `rows`.
enum class Layout { rows, channels };

/// A view of one linear map y = x Wᵀ + bias, in → out.
struct Weight {
  const void* data = nullptr;   // (out, in) or (in, out) by layout
  const float* bias = nullptr;  // (out) or null
  DType dtype = DType::f32;
  Layout layout = Layout::rows;
  int64_t in = 0;
  int64_t out = 0;

  /// A line: what lies together, the outputs of one input channel or the inputs of one output.
  int64_t lines() const { return layout == Layout::channels ? in : out; }
  int64_t line_length() const { return layout == Layout::channels ? out : in; }
  const void* line(int64_t i) const {
    return static_cast<const char*>(data) + i * larosa::line_bytes(dtype, line_length());
  }
  int64_t line_bytes() const { return larosa::line_bytes(dtype, line_length()); }
  int64_t bytes() const { return lines() * line_bytes(); }
  explicit operator bool() const { return data != nullptr; }
};

/// bfloat16 ↔ float32. Rounds to nearest even; NaN stays NaN.
inline float bf16_to_f32(uint16_t v) {
  return std::bit_cast<float>(uint32_t{v} << 16);
}
inline uint16_t f32_to_bf16(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
/// IEEE binary16 ↔ float32. Rounds to nearest even; overflow gives infinity.
float f16_to_f32(uint16_t v);
uint16_t f32_to_f16(float f);

/// Element i of an array of `dtype` (not int8, int4), as float32 (f64 is rounded).
float load_element(const void* data, DType dtype, int64_t i);
/// Rounds `value` once to `dtype` and stores it as element i.
void store_element(void* data, DType dtype, int64_t i, double value);

}  // namespace larosa
