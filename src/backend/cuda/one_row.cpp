#include "backend/cuda/one_row.h"

#include <algorithm>
#include <utility>

#include "base/error.h"

namespace larosa::cuda {
namespace {

bool overlap(const Mat& a, const float* b, int64_t n) {
  return a.data && b && a.data < b + n && b < a.data + a.cols;
}
bool overlap(const Mat& a, const Mat& b) {
  return overlap(a, b.data, b.cols);
}

}  // namespace

bool OneRow::Pending::touches(const Mat& m) const {
  return overlap(m, in.x, in.cols) || overlap(m, row);
}
bool OneRow::Pending::touches(std::span<const Product> products) const {
  return std::any_of(products.begin(), products.end(), [&](const Product& p) { return touches(p.y); });
}

OneRow::OneRow(const Stream& stream) : stream_(stream) {
  chain_.done = static_cast<uint32_t*>(done_.at_least(4));
  check(cudaMemsetAsync(sent_.at_least(kMostSent * 8), 0, kMostSent * 8, stream_.stream), "memory");
  check(cudaMemsetAsync(chain_.done, 0, 4, stream_.stream), "memory");
  check(cudaMemsetAsync(guesses_.at_least(kGuesses * 4), 0, kGuesses * 4, stream_.stream), "memory");
}

void OneRow::flush() {
  flush_waiting();
  chain_.cut();
}
void OneRow::flush_waiting() {
  flush_rows();
  flush_skip();
}

/// The rows that waiting operations write.
void OneRow::flush_rows() {
  if (pair_) {
    const PendingPair pair = *std::exchange(pair_, std::nullopt);
    launch(pair.from, pair.product, {});
  }
  if (row_) make(*std::exchange(row_, std::nullopt));
  if (rope_) {
    const PendingRope rope = *std::exchange(rope_, std::nullopt);
    chain_.cut();
    cuda::rope(stream_, rope.q, rope.k, rope.head_dim, rope.at);
  }
}

void OneRow::flush_skip() {
  if (!skip_) return;
  const PendingSkip skip = *std::exchange(skip_, std::nullopt);
  for (int i = 0; i < skip.count; ++i) {
    const Product product{skip.weight[i], skip.y, i > 0};
    multiply_from(plain(skip.x[i]), std::span(&product, 1));
  }
}

/// The row on its own: the state that the caller of the door believes in.
void OneRow::make(const Pending& p) {
  const Mat x(const_cast<float*>(p.in.x), 1, p.in.cols);
  chain_.cut();
  if (p.in.source == Source::norm) cuda::rms_norm(stream_, x, p.in.gain, p.in.eps, p.row);
  if (p.in.masked) cuda::select(stream_, p.row, p.in, p.in.masked, p.in.kept);
}

OneRow::Pending OneRow::plain(Mat row) {
  Pending p;
  p.in.cols = static_cast<int>(row.cols);
  p.in.x = row.data;
  p.row = row;
  return p;
}
/// p once it has been made: the row, or what a selection has left of it.
OneRow::Pending OneRow::made(const Pending& p) {
  Pending row = plain(p.in.masked ? Mat(p.in.masked, 1, p.in.cols) : p.row);
  row.stored = p.stored;
  return row;
}

/// x as the source of a product: what waits to become it, or x itself. A skip waits on.
OneRow::Pending OneRow::take_row(Mat x) {
  if (row_ && !row_->in.masked && row_->row.data == x.data && row_->row.cols == x.cols) {
    Pending taken = *std::exchange(row_, std::nullopt);
    flush_rows();
    return taken;
  }
  flush_rows();
  if (skip_ && overlap(skip_->y, x)) flush_skip();
  return plain(x);
}

void OneRow::rms_norm(Mat x, const float* gain, float eps, Mat y) {
  flush_waiting();
  Input in;
  in.source = Source::norm;
  in.cols = static_cast<int>(x.cols);
  in.x = x.data;
  in.gain = gain;
  in.eps = eps;
  row_ = Pending{in, y, nullptr};
}

void OneRow::select(Mat x, const Input& rule, CudaSelection& kept) {
  Pending next = take_row(x);
  next.in.select = rule.select;
  next.in.keep = rule.keep;
  next.in.cut = rule.cut;
  next.in.scale = rule.scale;
  next.in.masked = kept.one->masked;
  next.in.kept = kept.one->kept;
  next.stored = kept.one;
  row_ = next;
}

void OneRow::rope(Mat q, Mat k, int64_t head_dim, const Angles& at) {
  flush_waiting();
  rope_ = PendingRope{q, k, head_dim, at};
}

void OneRow::attend(Mat q, Mat k, Mat v, const CacheLayer& cache, int64_t pos, int64_t window, Mat out) {
  std::optional<PendingRope> rope;
  if (rope_ && rope_->q.data == q.data && rope_->k.data == k.data && rope_->head_dim == cache.head_dim)
    rope.swap(rope_);
  flush_waiting();
  attend_row(stream_, q, k, v, cache, pos, window, out, rope ? &rope->at : nullptr, sent_.get<uint64_t>(),
             chain_);
}

void OneRow::glu(Mat gate, Mat up, const Activation& activation, Mat mid) {
  if (pair_ && pair_->product[0].y.data == gate.data && pair_->product[1].y.data == up.data &&
      gate.cols == pair_->product[0].y.cols && !overlap(mid, gate) && !overlap(mid, up) &&
      !pair_->from.touches(mid)) {
    const PendingPair pair = *std::exchange(pair_, std::nullopt);
    return launch(pair.from, pair.product, {activation, mid.data});
  }
  flush();
  cuda::glu(stream_, gate, up, activation, mid);
}

void OneRow::rotate(Mat x, const Weight& basis, Mat y, bool accumulate) {
  CHECK(basis.in == x.cols && basis.out == y.cols);
  const Product product{basis, y, accumulate};
  if (basis.layout != Layout::channels) return multiply(x, std::span(&product, 1));
  const bool more = skip_ && accumulate && skip_->y.data == y.data && skip_->y.cols == y.cols &&
                    skip_->count < kMostSkips && !row_;
  if (!more) {
    flush_waiting();
    if (accumulate) return multiply_from(plain(x), std::span(&product, 1));
    skip_ = PendingSkip{{}, y, {}, 0};
  }
  skip_->x[skip_->count] = x;
  skip_->weight[skip_->count++] = basis;
}

void OneRow::multiply(Mat x, std::span<const Product> products) {
  if (row_ && row_->touches(products)) flush_waiting();
  multiply_from(take_row(x), products);
}

void OneRow::multiply_kept(const CudaSelection& kept, std::span<const Product> products) {
  if (row_ && row_->stored == kept.one && !row_->touches(products))
    return multiply_from(*std::exchange(row_, std::nullopt), products);
  flush_waiting();
  Pending row = plain(kept.mat());
  row.stored = kept.one;
  multiply_from(row, products);
}

void OneRow::multiply_outputs(Mat x, const CudaSelection& kept, const Product& product) {
  flush();
  auto* const scratch = static_cast<int32_t*>(outputs_.at_least((1 + kept.cols) * 4));
  gemv_outputs(stream_, plain(x).in, product, kept.mat().data, scratch);
}

/// The first launch makes the row and writes it down, and the others read it.
void OneRow::multiply_from(Pending from, std::span<const Product> products) {
  for (const Product& p : products) CHECK(p.weight.in == from.in.cols && p.y.cols == p.weight.out);
  if (skip_ && !takes_skip(from, products)) flush_skip();
  for (size_t first = 0, end = 0; first < products.size(); first = end) {
    const Weight& w = products[first].weight;
    for (end = first + 1; end < products.size() && end - first < kMostProducts; ++end)
      if (!gemv_together(w, products[end].weight)) break;
    if (w.layout == Layout::rows) {
      end = first + 1;
      from = multiply_rows(from, products[first]);
      continue;
    }
    if (end == products.size() && products.size() == 2 && first == 0 && w.out == products[1].weight.out &&
        !products[0].accumulate && !products[1].accumulate && !from.touches(products)) {
      pair_ = PendingPair{from, {products[0], products[1]}};
      return;
    }
    launch(from, products.subspan(first, end - first), {});
    from = made(from);
  }
}

/// True when the product is added to what the skip gives.
bool OneRow::takes_skip(const Pending& from, std::span<const Product> products) const {
  if (products.size() != 1 || !products[0].accumulate || products[0].y.data != skip_->y.data ||
      products[0].y.cols != skip_->y.cols || from.touches(skip_->y))
    return false;
  return std::all_of(skip_->weight, skip_->weight + skip_->count,
                     [&](const Weight& w) { return gemv_skips(stream_, products[0].weight, w); });
}

/// The one place where gemv is launched: with the skip that waits for this product.
void OneRow::launch(Pending from, std::span<const Product> products, const Glu& glu) {
  const Weight& w = products[0].weight;
  if ((from.in.source == Source::norm || from.in.masked) && !gemv_fuses(stream_, from.in, w)) {
    make(from);
    from = made(from);
  }
  Input in = from.in;
  if (in.source == Source::norm) in.values = from.row.data;
  if (in.select == Selects::topk) in.guess = guess_of(w);
  Skip skips[kMostSkips];
  size_t count = 0;
  Product alone = products[0];
  if (skip_) {
    const PendingSkip skip = *std::exchange(skip_, std::nullopt);
    for (; count < static_cast<size_t>(skip.count); ++count)
      skips[count] = {skip.x[count].data, skip.weight[count]};
    alone.accumulate = false;
    products = std::span(&alone, 1);
  }
  gemv(stream_, in, products, std::span(skips, count), glu, sent_.get<uint64_t>(), chain_);
}

/// Where the cut of a weight's row stood the last time: the next one is near it. Any number will do: weights
/// beyond kGuesses share them.
int32_t* OneRow::guess_of(const Weight& w) {
  const auto [at, fresh] = guess_at_.try_emplace(w.data, static_cast<int>(guess_at_.size()) % kGuesses);
  return guesses_.get<int32_t>() + at->second;
}

/// A product with a weight in rows layout; returns the row for the next one.
OneRow::Pending OneRow::multiply_rows(Pending from, const Product& product) {
  if (from.in.masked || (from.in.source == Source::norm && from.in.cols > kMostHeld)) {
    make(from);
    from = made(from);
  }
  Input in = from.in;
  if (in.source == Source::norm) in.values = from.row.data;
  chain_.cut();
  gemv_rows(stream_, in, product);
  return made(from);
}

}  // namespace larosa::cuda
