#include "base/quant.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

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

void write_level(std::byte* line, DType t, int64_t i, int level) {
  if (t == DType::int8) {
    line[i] = static_cast<std::byte>(static_cast<int8_t>(level));
    return;
  }
  const auto [byte, shift] = nibble_of(i);
  line[byte] |= static_cast<std::byte>((level + 8) << shift);
}

/// Levels of values / scale and their squared error.
double round_group(const float* values, int64_t count, float scale, int least, int most, int* levels) {
  const float inverse = scale != 0 ? 1 / scale : 0;
  double error = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float level =
        std::clamp(std::nearbyint(values[i] * inverse), static_cast<float>(least), static_cast<float>(most));
    const double miss =
        static_cast<double>(values[i]) - static_cast<double>(level) * static_cast<double>(scale);
    levels[i] = static_cast<int>(level);
    error += miss * miss;
  }
  return error;
}

}  // namespace

void quantise_line(const float* values, int64_t n, DType t, std::byte* line) {
  const int64_t group = quant_group(t);
  std::memset(line, 0, static_cast<size_t>(line_bytes(t, n)));
  std::array<int, kQuantBlock> levels{}, best{};
  for (int64_t first = 0; first < padded_line(n); first += group) {
    const int64_t count = std::clamp<int64_t>(n - first, 0, group);
    float largest = 0;  // of greatest size, with its sign
    for (int64_t i = 0; i < count; ++i)
      if (std::fabs(values[first + i]) > std::fabs(largest)) largest = values[first + i];
    // int8: the range as it is, clipping gains nothing at 8 bits. int4: there is a level more below zero than
    // above, so the largest value's sign decides the scale's; clipping the tail pays.
    constexpr std::array<float, 1> kWhole = {127.0f};
    constexpr std::array<float, 9> kClipped = {-7.0f, -7.5f,  -8.0f,  -8.5f, -9.0f,
                                               -9.5f, -10.0f, -11.0f, 7.0f};
    double least = -1;
    uint16_t scale = 0;
    const auto attempt = [&](float steps) {
      const uint16_t bits = f32_to_f16(std::clamp(largest / steps, -65504.0f, 65504.0f));
      const double error = round_group(values + first, count, f16_to_f32(bits), t == DType::int4 ? -8 : -127,
                                       t == DType::int4 ? 7 : 127, levels.data());
      if (least >= 0 && error >= least) return;
      least = error;
      scale = bits;
      best = levels;
    };
    if (t == DType::int4) {
      for (float steps : kClipped) attempt(steps);
    } else {
      for (float steps : kWhole) attempt(steps);
    }
    for (int64_t i = 0; i < group; ++i)
      write_level(line, t, first + i, i < count ? best[static_cast<size_t>(i)] : 0);
    std::memcpy(line + scales_offset(t, n) + first / group * 2, &scale, sizeof(scale));
  }
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
