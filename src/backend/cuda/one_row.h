// Decoding: which launches the operations of one row become.
//
// One row is bound by bytes and launches, so an operation is not launched by itself when a neighbour can do
// it on the way. It waits: a norm or a selection for the product that reads it, a rotation of positions for
// attention, a product of two weights for the gated activation of its outputs, a change of the stream's basis
// for the product that is added to it. Whoever does something else flushes first.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <unordered_map>

#include "backend/cuda/kernels.h"
#include "backend/cuda/storage.h"

namespace larosa::cuda {

class OneRow {
 public:
  explicit OneRow(const Stream& stream);

  /// Launches everything that waits: the caller launches something else next.
  void flush();

  /// y becomes the norm of x, no alias; gain may be null.
  void rms_norm(Mat x, const float* gain, float eps, Mat y);
  /// `kept` becomes what `rule` keeps of x.
  void select(Mat x, const Input& rule, CudaSelection& kept);
  /// Rotates q and k in place. Nothing else waits.
  void rope(Mat q, Mat k, int64_t head_dim, const Angles& at);
  /// Attention of one row, which does that on the way.
  void attend(Mat q, Mat k, Mat v, const CacheLayer& cache, int64_t pos, int64_t window, Mat out);
  /// mid = a(gate) · up.
  void glu(Mat gate, Mat up, const Activation& activation, Mat mid);
  /// y = x R (+ y).
  void rotate(Mat x, const Weight& basis, Mat y, bool accumulate);
  void multiply(Mat x, std::span<const Product> products);
  void multiply_kept(const CudaSelection& kept, std::span<const Product> products);
  /// Of the product the outputs in `kept`, zero elsewhere; rows layout.
  void multiply_outputs(Mat x, const CudaSelection& kept, const Product& product);

 private:
  /// A row that has not been made yet, and what is to be selected from it.
  struct Pending {
    Input in;
    Mat row;                            // where it will stand
    std::shared_ptr<StoredRow> stored;  // where its selection goes (in.masked), or what it is read from

    bool touches(const Mat& m) const;
    bool touches(std::span<const Product> products) const;
  };
  struct PendingRope {
    Mat q, k;
    int64_t head_dim;
    Angles at;
  };
  /// A product whose two outputs a gated activation may follow.
  struct PendingPair {
    Pending from;
    Product product[2];
  };
  /// y = x times one or two weights, from where the stream stands to where a product will be added.
  struct PendingSkip {
    Mat x[kMostSkips], y;
    Weight weight[kMostSkips];
    int count = 0;
  };

  static Pending plain(Mat row);
  static Pending made(const Pending& p);
  Pending take_row(Mat x);
  void make(const Pending& p);
  void flush_rows();
  void flush_skip();
  bool takes_skip(const Pending& from, std::span<const Product> products) const;
  void multiply_from(Pending from, std::span<const Product> products);
  void launch(Pending from, std::span<const Product> products, const Glu& glu);
  Pending multiply_rows(Pending from, const Product& product);
  int32_t* guess_of(const Weight& w);
  /// The same, but what comes next is one of ours.
  void flush_waiting();

  static constexpr int kGuesses = 4096;
  const Stream& stream_;
  std::optional<Pending> row_;
  std::optional<PendingRope> rope_;
  std::optional<PendingPair> pair_;
  std::optional<PendingSkip> skip_;
  Buffer sent_, done_, guesses_, outputs_;
  std::unordered_map<const void*, int> guess_at_;
  Chain chain_;
};

}  // namespace larosa::cuda
