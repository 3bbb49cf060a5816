#include "base/types.h"

#include <cstring>

#include "base/error.h"
#include "base/quant.h"

namespace larosa {

DType dtype_of(const std::string& name) {
  constexpr DType kTypes[] = {DType::f32, DType::f16,  DType::bf16, DType::f64,
                              DType::u8,  DType::int8, DType::int4};
  for (const DType t : kTypes)
    if (name == dtype_name(t)) return t;
  CHECK(false);  // flags and files are checked where they are read
  return DType::f32;
}

int64_t line_bytes(DType t, int64_t n) {
  if (!quantised(t)) return n * dtype_size(t);
  constexpr int64_t kLine = 64;
  const int64_t padded = padded_line(n);
  const int64_t bytes = (t == DType::int4 ? padded / 2 : padded) + padded / quant_group(t) * 2;
  return (bytes + kLine - 1) / kLine * kLine;
}

float f16_to_f32(uint16_t v) {
  const uint32_t sign = (v & 0x8000u) << 16;
  const uint32_t exponent = (v >> 10) & 0x1fu;
  const uint32_t mantissa = v & 0x3ffu;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal: exact in float32
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
}

uint16_t f32_to_f16(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // >= 65520 rounds to infinity
  if (magnitude < 0x38800000u) {  // below the smallest normal: adding 0.5 aligns the subnormal's last bit
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

namespace {
template <class T>
T read(const void* data, int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}
template <class T>
void write(void* data, int64_t i, T value) {
  std::memcpy(static_cast<char*>(data) + i * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
}

/// float64 → float32 that keeps what a second rounding needs (round to odd), so that storing to 16 bits
/// afterwards equals one rounding from float64.
float to_f32_odd(double value) {
  const float nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || nearest - nearest != 0.0f) return nearest;
  const uint32_t bits = std::bit_cast<uint32_t>(nearest);
  if (bits & 1u) return nearest;
  const double magnitude = value < 0 ? -value : value;
  const bool below = magnitude > static_cast<double>(std::bit_cast<float>(bits & 0x7fffffffu));
  return std::bit_cast<float>(below ? bits + 1 : bits - 1);
}
}  // namespace

float load_element(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32:
      return read<float>(data, i);
    case DType::f16:
      return f16_to_f32(read<uint16_t>(data, i));
    case DType::bf16:
      return bf16_to_f32(read<uint16_t>(data, i));
    case DType::f64:
      return static_cast<float>(read<double>(data, i));
    case DType::u8:
      return static_cast<float>(read<uint8_t>(data, i));
    case DType::int8:
    case DType::int4:
      break;
  }
  CHECK(!quantised(dtype));
  return 0;
}

void store_element(void* data, DType dtype, int64_t i, double value) {
  switch (dtype) {
    case DType::f32:
      return write(data, i, static_cast<float>(value));
    case DType::f16:
      return write(data, i, f32_to_f16(to_f32_odd(value)));
    case DType::bf16:
      return write(data, i, f32_to_bf16(to_f32_odd(value)));
    case DType::f64:
      return write(data, i, value);
    case DType::u8:
      return write(data, i, static_cast<uint8_t>(value));
    case DType::int8:
    case DType::int4:
      break;
  }
  CHECK(!quantised(dtype));
}

}  // namespace larosa
