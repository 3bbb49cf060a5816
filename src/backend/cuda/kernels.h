// Host side of the CUDA kernels, one launcher per operation beside its kernel. All pointers are device memory
// unless said otherwise; everything is issued on `Stream::stream` in order and nothing waits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <span>

#include "backend/backend.h"

namespace larosa::cuda {

/// Where kernels go, and what the device offers.
struct Stream {
  cudaStream_t stream = nullptr;
  int device = 0;
  int multiprocessors = 0;
  int shared_bytes = 0;    // a block's dynamic shared memory, beside kStaticShared
  bool dependent = false;  // programmatic dependent launch, clusters (compute capability 9.0)
};

/// Room for what kernels declare themselves.
inline constexpr int kStaticShared = 10240;

/// True when the kernels in use wait for each other themselves: they were not compiled for a device before
/// compute capability 9.0.
bool launches_may_depend();

/// A stream of a device, which becomes the thread's. Throws Error when it is too old.
Stream make_stream(int device);

/// Throws Error naming `what` for a failed call.
void check(cudaError_t error, const char* what);

/// What a product's row is made of, before anything is selected.
enum class Source { row, norm };
/// Which of its entries count.
enum class Selects { all, topk, threshold };

/// Entries of the longest row that a product's blocks can make: they have it in their registers.
inline constexpr int kMostHeld = 20480;

/// One row as a product wants it, made by the product's own blocks.
struct Input {
  Source source = Source::row;
  Selects select = Selects::all;
  int cols = 0, keep = 0;
  float cut = 0, eps = 0;
  const float* x = nullptr;      // the row, or what is normalised to it
  const float* gain = nullptr;   // norm, or null
  const float* scale = nullptr;  // score weights, or null
  float* values = nullptr;       // where norm puts the row; or null
  int left = 0;                  // entries that a block puts there or to masked: the launch's to say
  int32_t* guess = nullptr;      // the cut of the last time, left for the next; or null
  float* masked = nullptr;       // where a selection goes, as a row with zeros; or null
  int32_t* kept = nullptr;       // and how many entries it kept
};

/// True when all of its entries count.
inline bool keeps_all(const Input& in) {
  return in.select == Selects::all || (in.select == Selects::topk && in.keep == in.cols);
}

/// A second row, all of it times weights of its own, whose product is added to the first output.
struct Skip {
  const float* x = nullptr;
  Weight weight;
};
inline constexpr int kMostSkips = 2;

/// mid = a(gate) · up, of the two outputs of a product.
struct Glu {
  Activation activation;
  float* mid = nullptr;  // or null: nothing
};

/// Sums with stamps that blocks which share an output send each other at most: room for so many, zero at
/// first, is called `sent`.
inline constexpr int64_t kMostSent = int64_t{4096} * 512;

/// How a launch waits for the one before: by a counter that grows by one for every block that has ended.
struct Link {
  uint32_t* done = nullptr;
  uint32_t wanted = 0;  // its value once the launch before has ended
  bool polls = false;   // that one is counted: wait for the counter, not for its grid
};
/// Counted launches that follow each other with nothing in between.
class Chain {
 public:
  uint32_t* done = nullptr;  // on the device, zero at first
  /// How the next launch waits.
  Link link(const Stream& s) const { return {done, count_, linked_ && s.dependent}; }
  /// It has been launched, with so many blocks, each of which signals.
  void launched(unsigned blocks) {
    count_ += blocks;
    linked_ = true;
  }
  /// Something else is launched next.
  void cut() { linked_ = false; }
  /// The first of `count` stamps in a row that no launch before had (of the last 2^32 stamps).
  uint32_t stamps(uint32_t count) { return (stamp_ += count) - count; }

 private:
  uint32_t stamp_ = 1;
  uint32_t count_ = 0;
  bool linked_ = false;
};

/// Blocks that share a product's channels, side by side: a device has as many multiprocessors at least.
inline constexpr int kGroup = 4;
/// True when gemv can make the row itself. A longer one has to stand in memory with its zeros, and has at
/// most gemv_longest entries.
bool gemv_fuses(const Stream& s, const Input& in, const Weight& w);
int64_t gemv_longest(const Stream& s);
/// True when both can be products of one launch.
bool gemv_together(const Weight& a, const Weight& b);
/// True when gemv can add x times `skip` to the product of a row with w.
bool gemv_skips(const Stream& s, const Weight& w, const Weight& skip);
/// y (1, out) of every product; channels layout, types as gemv_together says, at most kMostProducts. Skips:
/// of one product, as gemv_skips says. glu: of two products of equal shape.
inline constexpr int kMostProducts = 4;
void gemv(const Stream& s, const Input& in, std::span<const Product> products, std::span<const Skip> skips,
          const Glu& glu, uint64_t* sent, Chain& chain);
/// The same for one weight in rows layout; nothing is selected, and a norm has kMostHeld entries at most.
void gemv_rows(const Stream& s, const Input& in, const Product& product);
/// Of it the outputs where `chosen` (1, out) is not zero; the others become zero. scratch: 1 + out integers.
void gemv_outputs(const Stream& s, const Input& in, const Product& product, const float* chosen,
                  int32_t* scratch);

/// Selection of (rows, cols) to `masked` (rows, cols) and `kept` (rows).
void select(const Stream& s, Mat x, const Input& rule, float* masked, int32_t* kept);
/// count[0] entries of a row that are not +0, and their indices in order.
void list_entries(const Stream& s, const float* row, int64_t cols, int32_t* count, int32_t* index);

void embed(const Stream& s, const Weight& table, const int32_t* tokens, int32_t only, Mat x);
void rms_norm(const Stream& s, Mat x, const float* gain, float eps, Mat y);
void glu(const Stream& s, Mat gate, Mat up, const Activation& activation, Mat mid);
void activate(const Stream& s, Mat z, const Activation& activation, Mat y);
/// y = x where kept is zero (inverted: where it is not), else zero; x may be y.
void mask(const Stream& s, Mat kept, bool inverted, Mat x, Mat y);
void log_softmax(const Stream& s, Mat x);

/// Entries of a row and their indices there.
struct Entries {
  float* value = nullptr;
  int32_t* id = nullptr;
};
/// Stretches of a long row whose largest are found first: of 151,936 entries 4748 each, and of 256 wanted
/// 8192 in all, so that neither launch has more than 16 entries a thread.
inline constexpr int kStretches = 32, kMostLargest = 256;
/// True when `largest` takes so many of so long a row.
bool finds_largest(int64_t cols, int64_t count);
/// The largest of x (1, cols), as Backend::largest. stretches: room for kStretches · count; to: device
/// memory, or the host's where kernels write to it.
void largest(const Stream& s, Mat x, int count, const Entries& stretches, const Entries& to);

/// cosine and sine (rows, half) of float(pos + t) · inv_freq[i], as the models were trained with.
struct Angles {
  float* cosine = nullptr;
  float* sine = nullptr;
};
void angles(const Stream& s, int64_t pos, int64_t rows, int64_t half, const float* inv_freq,
            const Angles& to);
void rope(const Stream& s, Mat q, Mat k, int64_t head_dim, const Angles& at);

/// One layer of a cache: keys and values (kv_heads, capacity, head_dim), with int8 their scales (kv_heads,
/// capacity).
struct CacheLayer {
  void* keys = nullptr;
  void* values = nullptr;
  float* key_scales = nullptr;
  float* value_scales = nullptr;
  DType dtype = DType::f32;
  int64_t kv_heads = 0, head_dim = 0, capacity = 0;
};
inline constexpr int kWidestHead = 256;
/// Appends k, v and attends: several rows.
void attend(const Stream& s, Mat q, Mat k, Mat v, const CacheLayer& cache, int64_t pos, int64_t window,
            Mat out);
/// The same of one row, whose q and k are rotated by `at` on the way when it is given. Throws Error for more
/// positions than `sent` has room for: the longer a context, the more stretches whose scores a block holds
/// (64 heads of 128, eight to a key/value head, 99 KB: some 400,000).
void attend_row(const Stream& s, Mat q, Mat k, Mat v, const CacheLayer& cache, int64_t pos, int64_t window,
                Mat out, const Angles* at, uint64_t* sent, Chain& chain);
/// Elements [first, first + count) of the outputs of `w`, as f32 or bf16, all inputs: rows layout (count, in)
/// with `pitch` elements a line, channels (in, count). What pitch leaves over is zero.
void widen_weight(const Stream& s, const Weight& w, int64_t first, int64_t count, bool bf16, int64_t pitch,
                  void* to);
/// x (rows, cols) rounded to bf16, lines of `pitch`, the rest zero.
void round_rows(const Stream& s, Mat x, int64_t pitch, void* to);
/// x (rows, cols) in float64, without gaps.
void widen_rows(const Stream& s, Mat x, double* to);
/// y[t] = bias (+ y[t] when accumulate)
void start_rows(const Stream& s, const float* bias, bool accumulate, Mat y);

}  // namespace larosa::cuda
