// The table of single-threaded kernels of one instruction set. cpu.cpp fills one per backend by run-time
// dispatch and splits the work over the threads; a kernel sees plain pointers, allocates nothing and throws
// nothing.
#pragma once

#include <cstdint>

#include "base/types.h"

namespace larosa {

/// The channels of a product whose values are not zero, in order, are summed in chains: the first half of
/// them and the second, which are added at the end. So two threads can read whole rows of a narrow weight,
/// each its own, where halves of every row would cost both of them a page (Llama-3.2-1B shape, bf16, 2
/// threads: 84 % of the read bandwidth instead of 79 %, median of 6). A zero is in no list: leaving it out
/// changes no bit.
constexpr int64_t kChains = 2;

/// Channels with what multiplies them, none of it zero.
struct ChannelList {
  int32_t* index;  // ascending
  float* value;
  int64_t count;

  ChannelList chain(int64_t c) const {
    const int64_t begin = count * c / kChains;
    return {index + begin, value + begin, count * (c + 1) / kChains - begin};
  }
};

/// What the exact selection of `keep` entries came to: everything with a key above `cut`, and the first
/// `ties` entries whose key equals it.
struct Cut {
  int32_t key = 0;
  int64_t ties = 0;
};

/// Keys or values of one head as the cache keeps them: (n, E) elements, and with int8 the scale (n) of each
/// position.
struct StoredHead {
  const void* data;
  const float* scale;  // null unless int8
};

/// Heads that attend_group takes side by side, and its room for their scores.
constexpr int64_t kAttendHeads = 4;
constexpr int64_t kAttendStride = 256;
constexpr int64_t kAttendScore = kAttendHeads * kAttendStride;

struct Kernels {
  // -- embed: storage ↔ float32 -------------------------------------------------------------------------
  /// to[i] = from[i] widened.                                       n elements of `dtype`
  void (*widen)(const void* from, DType dtype, int64_t n, float* to);
  /// to[i] = value first + i of a line (out or in long) of any stored type; `first` at a block of 128 when
  /// quantised.
  void (*widen_line)(const Weight& w, int64_t line, int64_t first, int64_t count, float* to);
  /// to[i] = from[i] rounded to nearest even.                       dtype f32, f16 or bf16
  void (*narrow)(const float* from, DType dtype, int64_t n, void* to);

  // -- norm ---------------------------------------------------------------------------------------------
  void (*rms_norm)(const float* x, const float* gain, float eps, int64_t n, float* y);

  // -- gemv ---------------------------------------------------------------------------------------------
  /// part[j − begin] = Σ_c value[c] · w[index[c], j] for j in [begin, end), one chain of fused multiply-adds
  /// per output in the order of c. part: aligned to 64 bytes, in an order of the kernel's own within every
  /// 128, with room for a multiple of 128; begin at a multiple of 128.  w (in, out) channels
  void (*gemv_chain)(const Weight& w, const int32_t* index, const float* value, int64_t count, int64_t begin,
                     int64_t end, float* part);
  /// y[j] = even[j − begin] + odd[j − begin] (+ bias[j]) (+ y[j]) for j in [begin, end): the parts of both
  /// chains.
  void (*gemv_join)(const Weight& w, const float* even, const float* odd, int64_t begin, int64_t end,
                    bool accumulate, float* y);
  /// y[j] = Σ_i x[i] · w[j, i] (+ bias[j]) (+ y[j]) for j in [begin, end).  w (out, in) rows; x as pack_input
  /// left it
  void (*gemv_rows)(const Weight& w, const float* packed, int64_t begin, int64_t end, bool accumulate,
                    float* y);
  /// The same for the outputs index[0, count) alone, without accumulate.
  void (*gemv_outputs)(const Weight& w, const float* packed, const int32_t* index, int64_t count, float* y);
  /// x in the order in which gemv_rows meets the weights of `dtype`, padded with zeros to padded_line(n); for
  /// quantised ones rounded (rows-inl.h).  packed: padded_line(n), aligned to 64 bytes
  void (*pack_input)(const float* x, DType dtype, int64_t n, float* packed);

  // -- topk ---------------------------------------------------------------------------------------------
  // An entry's key is |x[i]| · scale[i] (scale null: ones) as an integer that orders like it, NaN above
  // infinity.
  /// The exact cut that leaves `keep` of n entries, 0 < keep ≤ n. `work`: room for n + 64 keys.
  Cut (*find_cut)(const float* x, const float* scale, int64_t n, int64_t keep, int32_t* work);
  /// Kept entries that are not zero as a list, with room for n + 64. Returns the number kept, zeros included.
  int64_t (*take_list)(const float* x, const float* scale, int64_t n, Cut cut, ChannelList& list);
  /// Kept entries in place, zeros elsewhere. Returns the number kept.
  int64_t (*take_masked)(const float* x, const float* scale, int64_t n, Cut cut, float* y);
  /// y += addend, both n.
  void (*add)(const float* addend, int64_t n, float* y);

  // -- rope ---------------------------------------------------------------------------------------------
  /// Turns the pairs (i, i + half) of one head by (cosine, sine)[i].
  void (*rope)(const float* cosine, const float* sine, int64_t half, float* head);

  // -- attend -------------------------------------------------------------------------------------------
  /// The query heads (heads, E) that share keys and values [0, n), n ≤ kAttendStride: folds these into every
  /// head's state (running maximum, sum, weighted mean of the values (E)), `stride` floats apart. `score`:
  /// room for kAttendScore.
  void (*attend_group)(const float* q, StoredHead keys, StoredHead values, DType dtype, int64_t n,
                       int64_t width, int64_t heads, float* score, float* state, int64_t stride);
  /// One head's key or value (n) as levels; returns the scale (backend.h, kKvTypes).
  float (*quantise_head)(const float* x, int64_t n, int8_t* levels);
  /// to (n, width) = scale[j] · level[j, e].
  void (*widen_heads)(StoredHead from, int64_t n, int64_t width, float* to);
  /// One row of scores [0, n) becomes e^(score − max) for [begin, end) and zero elsewhere. Returns by how
  /// much the results so far must be scaled.
  float (*soften)(float* score, int64_t n, int64_t begin, int64_t end, float* max, float* sum);
  /// x *= factor.
  void (*scale)(float factor, int64_t n, float* x);

  // -- glu, softmax ---------------------------------------------------------------------------------------
  void (*activate)(const float* z, const Activation& activation, int64_t n, float* y);
  void (*glu)(const float* gate, const float* up, const Activation& activation, int64_t n, float* mid);
  /// y[i] = x[i] where kept[i] is zero (inverted: where it is not), else zero.
  void (*mask)(const float* kept, bool inverted, const float* x, int64_t n, float* y);
  void (*log_softmax)(int64_t n, float* x);

  /// gemv_chain and gemv_rows, the same bits, as certain processors want memory read (reading-inl.h);
  /// choose_kernels() puts them in place. Null but for AVX3_DL.
  struct Gemv {
    decltype(Kernels::gemv_chain) chain;
    decltype(Kernels::gemv_rows) rows;
  };
  Gemv gemv_zen5, gemv_intel;

  const char* target = nullptr;  // Highway's name of the instruction set
};

// Each stem writes its part of the table for the instruction set that Highway has chosen.
void fill_embed(Kernels& kernels);
void fill_norm(Kernels& kernels);
void fill_gemv(Kernels& kernels);
void fill_topk(Kernels& kernels);
void fill_rope(Kernels& kernels);
void fill_attend(Kernels& kernels);
void fill_glu(Kernels& kernels);
void fill_softmax(Kernels& kernels);

}  // namespace larosa
