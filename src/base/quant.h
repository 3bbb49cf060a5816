// Quantised lines. A line is what one input channel feeds (its outputs), what one output reads (its inputs),
// or one row of an embedding: n values in one contiguous run with their scales behind them, so that a dropped
// one drags nothing along and a kept one is one read. Scales never span lines.
//
//   int8  P bytes, two's complement in [−127, 127];  then P / 128 scales
//   int4  P / 2 bytes: per 128 values 16 little-endian 32-bit words, bits 4k … 4k + 3 of word L hold
//         q + 8 of value 16 k + L, q in [−8, 7];  then P / 32 scales
//
// P is n rounded up to 128; scales are f16; a line is padded with zeros to 64 bytes. value = scale · q. The
// order of the nibbles lets vectors of 4, 8 or 16 lanes take consecutive values with one shift each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/types.h"

namespace larosa {

/// Values of a block: lines are cut between blocks only.
constexpr int64_t kQuantBlock = 128;

/// Values that share a scale: 128 (int8), 32 (int4).
constexpr int64_t quant_group(DType t) {
  return t == DType::int4 ? 32 : kQuantBlock;
}
/// n rounded up to whole blocks.
constexpr int64_t padded_line(int64_t n) {
  return (n + kQuantBlock - 1) / kQuantBlock * kQuantBlock;
}
/// Where the scales of a line of n values begin (f16, padded_line(n) / quant_group(t) of them), in bytes.
constexpr int64_t scales_offset(DType t, int64_t n) {
  return padded_line(n) * (t == DType::int4 ? 1 : 2) / 2;
}

/// Rounds values[0, n) to a line of type t (int8 or int4), line_bytes(t, n) bytes. Every group takes the
/// scale of least squared error among those tried. Values that are not finite are a mistake of the caller's.
void quantise_line(const float* values, int64_t n, DType t, std::byte* line);

/// The same for values `first` … `first` + count − 1 of a line of n, whole blocks of it: a line can be
/// written in parts. Padding after the scales is left alone.
void quantise_part(const float* values, int64_t first, int64_t count, int64_t n, DType t, std::byte* line);

/// Rounds `value`, a finite one, to the nearest level of the scale that value i of a line of n has already;
/// returns what stands there then.
float round_value(float value, int64_t i, int64_t n, DType t, std::byte* line);

/// values[0, count) = value `first` … of a line of n values, any stored type (one rounding: scale · q in
/// float32).
void read_line(const void* line, DType t, int64_t n, int64_t first, int64_t count, float* values);

/// All values of a weight, line after line.
std::vector<float> read_weight(const Weight& w);
/// Scale of value i of a line of n values.
float read_scale(const void* line, DType t, int64_t n, int64_t i);

}  // namespace larosa
