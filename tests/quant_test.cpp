// Quantised lines: the layout of base/quant.h byte by byte, what rounding costs, and every awkward line.
#include "base/quant.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "cases.h"

namespace larosa {
namespace {

constexpr DType kLineTypes[] = {DType::int8, DType::int4};
const std::vector<int64_t> kLengths = {1, 5, 31, 32, 33, 127, 128, 129, 200, 256, 700, 2048};

/// Bytes of a line with a guard behind it that nobody may touch.
struct Line {
  Line(DType t, int64_t n)
      : type(t), length(n), bytes(static_cast<size_t>(line_bytes(t, n)) + 64, std::byte{0xa5}) {}
  void quantise(const std::vector<float>& values) {
    quantise_line(values.data(), length, type, bytes.data());
    for (size_t i = bytes.size() - 64; i < bytes.size(); ++i) ASSERT_EQ(bytes[i], std::byte{0xa5});
  }
  std::vector<float> values() const {
    std::vector<float> v(static_cast<size_t>(length));
    read_line(bytes.data(), type, length, 0, length, v.data());
    return v;
  }
  /// Level of value i (also of the padding), as the head comment of base/quant.h says.
  int level(int64_t i) const {
    if (type == DType::int8) return static_cast<int8_t>(bytes[static_cast<size_t>(i)]);
    uint32_t word = 0;
    const int64_t block = i / 128, in_block = i % 128;
    std::memcpy(&word, bytes.data() + block * 64 + in_block % 16 * 4, sizeof(word));
    return static_cast<int>(word >> 4 * (in_block / 16) & 15) - 8;
  }
  float scale(int64_t i) const {
    const int64_t padded = (length + 127) / 128 * 128;
    const int64_t levels = type == DType::int8 ? padded : padded / 2, group = type == DType::int8 ? 128 : 32;
    uint16_t bits = 0;
    std::memcpy(&bits, bytes.data() + levels + i / group * 2, sizeof(bits));
    return f16_to_f32(bits);
  }

  DType type;
  int64_t length;
  std::vector<std::byte> bytes;
};

std::vector<float> normal_values(int64_t n, uint32_t seed) {
  cases::Random random(seed);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& v : values) v = 0.02f * random.normal();
  return values;
}

TEST(Quant, ALengthNamesItsType) {  // a file says nothing else about int8 and int4
  for (int64_t n = 1; n < 70000; ++n) {
    ASSERT_NE(line_bytes(DType::int8, n), line_bytes(DType::int4, n)) << n;
    ASSERT_EQ(line_bytes(DType::int8, n) % 64, 0);
    ASSERT_EQ(line_bytes(DType::int4, n) % 64, 0);
  }
  EXPECT_EQ(line_bytes(DType::int8, 1), 192);      // 128 + 2
  EXPECT_EQ(line_bytes(DType::int4, 1), 128);      // 64 + 8
  EXPECT_EQ(line_bytes(DType::int8, 4096), 4160);  // 4096 + 64
  EXPECT_EQ(line_bytes(DType::int4, 4096), 2304);  // 2048 + 256
}

TEST(Quant, LayoutOfTheDocument) {
  for (const DType t : kLineTypes) {
    for (const int64_t n : kLengths) {
      const std::vector<float> values = normal_values(n, 3);
      Line line(t, n);
      line.quantise(values);
      const std::vector<float> read = line.values();
      const int64_t padded = (n + 127) / 128 * 128, group = quant_group(t);
      for (int64_t i = 0; i < padded; ++i) {
        if (i < n) {
          ASSERT_EQ(read[static_cast<size_t>(i)], line.scale(i) * static_cast<float>(line.level(i)));
          ASSERT_EQ(line.scale(i), read_scale(line.bytes.data(), t, n, i));
        } else {
          ASSERT_EQ(line.level(i), 0) << i;
        }
        ASSERT_GE(line.level(i), t == DType::int8 ? -127 : -8);
      }
      const int64_t end = (t == DType::int8 ? padded : padded / 2) + padded / group * 2;
      for (int64_t i = end; i < line_bytes(t, n); ++i)
        ASSERT_EQ(line.bytes[static_cast<size_t>(i)], std::byte{0}) << i;
      for (const auto& [first, count] : {std::pair<int64_t, int64_t>{n / 3, n - n / 3}, {n - 1, 1}, {0, 0}}) {
        std::vector<float> part(static_cast<size_t>(count));
        read_line(line.bytes.data(), t, n, first, count, part.data());
        for (int64_t i = 0; i < count; ++i)
          ASSERT_EQ(part[static_cast<size_t>(i)], read[static_cast<size_t>(first + i)]);
      }
    }
  }
}

TEST(Quant, LevelsComeBack) {  // values that are levels are stored exactly
  for (const DType t : kLineTypes) {
    const int64_t n = 256;
    const int most = t == DType::int8 ? 127 : 7, least = t == DType::int8 ? -127 : -8;
    std::vector<float> values(n);
    for (int64_t i = 0; i < n; ++i)
      values[static_cast<size_t>(i)] =
          0.25f * static_cast<float>(least + (i * 7 + i / 32) % (most - least + 1));
    for (int64_t i = 0; i < n; i += 32) values[static_cast<size_t>(i)] = 0.25f * static_cast<float>(least);
    Line line(t, n);
    line.quantise(values);
    EXPECT_EQ(line.values(), values) << dtype_name(t);
  }
}

TEST(Quant, ErrorBounds) {
  for (const DType t : kLineTypes) {
    const int64_t n = 2048, group = quant_group(t);
    const std::vector<float> values = normal_values(n, 5);
    Line line(t, n);
    line.quantise(values);
    const std::vector<float> read = line.values();
    double squares = 0, misses = 0;
    for (int64_t first = 0; first < n; first += group) {
      double largest = 0, error = 0, plain = 0;
      for (int64_t i = first; i < first + group; ++i) {
        const double v = double{values[static_cast<size_t>(i)]};
        if (std::fabs(v) > std::fabs(largest)) largest = v;
      }
      // The scale that maps the largest value to the last level, in f16 as any other.
      const double scale =
          double{f16_to_f32(f32_to_f16(static_cast<float>(largest / (t == DType::int8 ? 127 : -8))))};
      for (int64_t i = first; i < first + group; ++i) {
        const double v = double{values[static_cast<size_t>(i)]};
        const double level = std::clamp(std::nearbyint(v / scale), t == DType::int8 ? -127.0 : -8.0,
                                        t == DType::int8 ? 127.0 : 7.0);
        const double miss = v - double{read[static_cast<size_t>(i)]};
        error += miss * miss;
        plain += std::pow(v - level * scale, 2);
        squares += v * v;
        if (t == DType::int8) {  // half a level, and what f16 takes from the largest value
          EXPECT_LE(std::fabs(miss), (0.5 + 127.0 / 2048) * std::fabs(scale) * 1.0001);
        }
      }
      EXPECT_LE(error, plain * 1.0001);
      misses += error;
    }
    // Gaussian values: int8 6e-3 of their size, int4 8 %. More would be a wrong scale.
    EXPECT_LT(std::sqrt(misses / squares), t == DType::int8 ? 7e-3 : 0.085) << dtype_name(t);
  }
}

TEST(Quant, ZeroTinyAndHugeValues) {
  for (const DType t : kLineTypes) {
    for (const int64_t n : kLengths) {
      Line line(t, n);
      line.quantise(std::vector<float>(static_cast<size_t>(n), 0.0f));
      for (const float v : line.values()) ASSERT_EQ(v, 0.0f);
      for (const float size : {1e-30f, 1e-9f, 1e-6f, 1e6f, 1e30f, std::numeric_limits<float>::max()}) {
        std::vector<float> values(static_cast<size_t>(n));
        for (int64_t i = 0; i < n; ++i) values[static_cast<size_t>(i)] = i % 3 == 0 ? size : -size / 2;
        line.quantise(values);
        const std::vector<float> read = line.values();
        for (int64_t i = 0; i < n;
             ++i) {  // scales end at 6e-8 and 65504: clamped, of the right sign, no surprise
          const float v = values[static_cast<size_t>(i)], r = read[static_cast<size_t>(i)];
          ASSERT_TRUE(std::isfinite(r));
          ASSERT_GE(r * std::copysign(1.0f, v), 0.0f) << size << " " << i;
          ASSERT_LE(std::fabs(r), std::max(std::fabs(v) * 1.2f, 1e-6f));
        }
      }
    }
  }
}

/// A value alone takes the nearest level of its scale; nothing else of the line changes.
TEST(Quant, ValuesAreReplacedOneByOne) {
  for (const DType t : kLineTypes) {
    const float least = t == DType::int8 ? -127.0f : -8.0f, most = t == DType::int8 ? 127.0f : 7.0f;
    for (const int64_t n : {1, 200, 700}) {
      Line line(t, n);
      line.quantise(normal_values(n, 4));
      const std::vector<float> before = line.values(), other = normal_values(n, 8);
      for (int64_t i = n - 1; i >= 0; i -= 3) {
        const float scale = line.scale(i), value = other[static_cast<size_t>(i)];
        const float stored = round_value(value, i, n, t, line.bytes.data());
        EXPECT_EQ(stored, scale * std::clamp(std::nearbyint(value * (1 / scale)), least, most)) << i;
        ASSERT_EQ(stored, line.values()[static_cast<size_t>(i)]);
        ASSERT_EQ(scale, line.scale(i));
      }
      const std::vector<float> after = line.values();
      for (int64_t i = 0; i < n; ++i) {
        if ((n - 1 - i) % 3 != 0) {
          ASSERT_EQ(after[static_cast<size_t>(i)], before[static_cast<size_t>(i)]);
        }
      }
    }
  }
}

TEST(Quant, PartsMakeTheLine) {
  for (const DType t : kLineTypes) {
    for (const int64_t n : {200, 256, 700}) {
      const std::vector<float> values = normal_values(n, 9);
      Line whole(t, n), parts(t, n);
      whole.quantise(values);
      std::fill(parts.bytes.begin(), parts.bytes.end() - 64, std::byte{0});
      for (int64_t first = 0; first < n; first += 128) {
        quantise_part(values.data() + first, first, std::min<int64_t>(128, n - first), n, t,
                      parts.bytes.data());
      }
      EXPECT_TRUE(whole.bytes == parts.bytes) << dtype_name(t) << " " << n;
    }
  }
}

}  // namespace
}  // namespace larosa
