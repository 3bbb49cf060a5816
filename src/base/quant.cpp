#include "base/quant.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <span>

#include "base/error.h"

namespace larosa {
namespace {

/// Byte and shift of the nibble of value i.
struct Nibble {
  int64_t byte;
  int shift;
};
Nibble nibble_of(int64_t i) {
  const int64_t in_block = i % kQuantBlock, word = in_block % 16, k = in_block / 16;
  return {i / kQuantBlock * (kQuantBlock / 2) + word * 4 + k / 2, k % 2 == 0 ? 0 : 4};
}

int read_level(const std::byte* line, DType t, int64_t i) {
  if (t == DType::int8) return static_cast<int8_t>(line[i]);
  const auto [byte, shift] = nibble_of(i);
  return (static_cast<int>(line[byte]) >> shift & 15) - 8;
}

constexpr float least_level(DType t) {
  return t == DType::int4 ? -8.0f : -127.0f;
}
constexpr float most_level(DType t) {
  return t == DType::int4 ? 7.0f : 127.0f;
}

/// Packs the levels of a block.
void write_block(std::byte* line, DType t, int64_t first, const std::array<int, kQuantBlock>& levels) {
  if (t == DType::int8) {
    for (int64_t i = 0; i < kQuantBlock; ++i)
      line[first + i] = static_cast<std::byte>(static_cast<int8_t>(levels[static_cast<size_t>(i)]));
    return;
  }
  std::memset(line + first / 2, 0, kQuantBlock / 2);
  for (int64_t i = 0; i < kQuantBlock; ++i) {
    const auto [byte, shift] = nibble_of(first + i);
    line[byte] |= static_cast<std::byte>((levels[static_cast<size_t>(i)] + 8) << shift);
  }
}

/// Levels of values / scale, rounded to nearest and clamped, and their squared error.
float try_scale(const float* values, int64_t count, float scale, DType t, float* levels) {
  const float inverse = scale != 0 ? 1 / scale : 0, least = least_level(t), most = most_level(t);
  float error = 0;
  for (int64_t i = 0; i < count; ++i) {
    constexpr float kRound = 0x1.8p23f;  // adding it leaves no bits for a fraction: nearest even
    const float level = (std::min(std::max(values[i] * inverse, least), most) + kRound) - kRound;
    const float miss = values[i] - level * scale;
    levels[i] = level;
    error += miss * miss;
  }
  return error;
}

/// Levels of values[0, count) and their scale (f16 bits), the one of least squared error among those tried.
/// int8: the range as it is, clipping gains nothing at 8 bits. int4: there is a level more below zero than
/// above, so the largest value's sign decides the scale's; clipping the tail pays.
uint16_t round_group(const float* values, int64_t count, DType t, int* levels) {
  static constexpr std::array<float, 1> kWhole = {127.0f};
  static constexpr std::array<float, 9> kClipped = {-8.0f, -7.0f,  -7.5f,  -8.5f, -9.0f,
                                                    -9.5f, -10.0f, -11.0f, 7.0f};
  const bool narrow = t == DType::int4;
  const std::span<const float> tried = narrow ? std::span<const float>(kClipped) : kWhole;
  float largest = 0;  // of greatest size, with its sign
  for (int64_t i = 0; i < count; ++i)
    if (std::fabs(values[i]) > std::fabs(largest)) largest = values[i];
  std::array<float, kQuantBlock> rounded{};
  float least = -1;
  uint16_t best = 0;
  for (const float steps : tried) {
    const uint16_t bits = f32_to_f16(std::clamp(largest / steps, -65504.0f, 65504.0f));
    const float error = try_scale(values, count, f16_to_f32(bits), t, rounded.data());
    if (least >= 0 && !(error < least)) continue;
    least = error;
    best = bits;
    for (int64_t i = 0; i < count; ++i) levels[i] = static_cast<int>(rounded[static_cast<size_t>(i)]);
  }
  return best;
}

}  // namespace

void quantise_part(const float* values, int64_t first, int64_t count, int64_t n, DType t, std::byte* line) {
  CHECK(first % kQuantBlock == 0 && (count % kQuantBlock == 0 || first + count == n));
  const int64_t group = quant_group(t);
  std::array<int, kQuantBlock> levels{};
  for (int64_t block = 0; block < count; block += kQuantBlock) {
    levels.fill(0);
    for (int64_t i = block; i < block + kQuantBlock; i += group) {
      const uint16_t scale =
          round_group(values + i, std::clamp<int64_t>(count - i, 0, group), t, levels.data() + (i - block));
      std::memcpy(line + scales_offset(t, n) + (first + i) / group * 2, &scale, sizeof(scale));
    }
    write_block(line, t, first + block, levels);
  }
}

void quantise_line(const float* values, int64_t n, DType t, std::byte* line) {
  quantise_part(values, 0, n, n, t, line);
  const int64_t end = scales_offset(t, n) + padded_line(n) / quant_group(t) * 2;
  std::memset(line + end, 0, static_cast<size_t>(line_bytes(t, n) - end));
}

float round_value(float value, int64_t i, int64_t n, DType t, std::byte* line) {
  const float scale = read_scale(line, t, n, i);
  float level = 0;
  try_scale(&value, 1, scale, t, &level);
  if (t == DType::int8) {
    line[i] = static_cast<std::byte>(static_cast<int8_t>(level));
  } else {
    const auto [byte, shift] = nibble_of(i);
    line[byte] = (line[byte] & ~(std::byte{15} << shift)) |
                 static_cast<std::byte>(static_cast<int>(level) + 8) << shift;
  }
  return scale * level;
}

void read_line(const void* line, DType t, int64_t n, int64_t first, int64_t count, float* values) {
  if (!quantised(t)) {
    for (int64_t i = 0; i < count; ++i) values[i] = load_element(line, t, first + i);
    return;
  }
  const auto* bytes = static_cast<const std::byte*>(line);
  for (int64_t i = 0; i < count; ++i) {
    values[i] = read_scale(bytes, t, n, first + i) * static_cast<float>(read_level(bytes, t, first + i));
  }
}

std::vector<float> read_weight(const Weight& w) {
  const int64_t length = w.line_length();
  std::vector<float> values(static_cast<size_t>(w.lines() * length));
  for (int64_t i = 0; i < w.lines(); ++i)
    read_line(w.line(i), w.dtype, length, 0, length, values.data() + i * length);
  return values;
}

float read_scale(const void* line, DType t, int64_t n, int64_t i) {
  uint16_t bits = 0;
  std::memcpy(&bits, static_cast<const std::byte*>(line) + scales_offset(t, n) + i / quant_group(t) * 2,
              sizeof(bits));
  return f16_to_f32(bits);
}

}  // namespace larosa
