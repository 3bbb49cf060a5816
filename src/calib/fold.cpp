#include "calib/fold.h"

#include <algorithm>
#include <cmath>

#include "backend/algebra.h"
#include "base/error.h"
#include "base/quant.h"
#include "base/thread_pool.h"
#include "model/model.h"

namespace larosa {
namespace {

/// Wt (in, out) in float64, whatever the source's layout.
Matrix widen_weight(const Weight& w, ThreadPool& pool) {
  Matrix m(w.in, w.out);
  pool.split(w.out, 64, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t i = 0; i < w.in; ++i) {
        m.row(i)[j] = load_element(w.data, w.dtype, w.layout == Layout::rows ? j * w.in + i : i * w.out + j);
      }
    }
  });
  return m;
}

std::vector<std::byte> round_to(const Matrix& m, DType dtype, ThreadPool& pool) {
  std::vector<std::byte> bytes(static_cast<size_t>(m.rows * m.cols * dtype_size(dtype)));
  pool.split(m.rows * m.cols, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      store_element(bytes.data(), dtype, i, m.data[static_cast<size_t>(i)]);
  });
  return bytes;
}

/// float64 → float32 for quantising; refuses what has no level.
void narrow(const std::string& name, std::span<const double> values, float* to) {
  for (size_t i = 0; i < values.size(); ++i) {
    to[i] = static_cast<float>(values[i]);
    if (!std::isfinite(to[i])) fail("tensor ", name, ": holds ", values[i], ", which cannot be quantised");
  }
}

FoldedTensor vector_tensor(const std::string& name, std::span<const double> values) {
  FoldedTensor tensor{name, DType::f32, {static_cast<int64_t>(values.size())}, {}};
  tensor.bytes.resize(values.size() * 4);
  for (size_t i = 0; i < values.size(); ++i)
    store_element(tensor.bytes.data(), DType::f32, static_cast<int64_t>(i), values[i]);
  return tensor;
}

/// The head bases as one block-diagonal (q_dim, q_dim) matrix: query head h turns by the basis of its KV
/// head.
Matrix block_diagonal(const ModelConfig& config, const std::vector<Matrix>& heads) {
  Matrix full(config.q_dim(), config.q_dim());
  const int64_t width = config.head_dim, group = config.heads / config.kv_heads;
  for (int64_t h = 0; h < config.heads; ++h) {
    const Matrix& basis = heads[static_cast<size_t>(h / group)];
    for (int64_t i = 0; i < width; ++i) std::copy_n(basis.row(i), width, full.row(h * width + i) + h * width);
  }
  return full;
}

/// Rows of head h ← Rᵀ rows (the o-slices of a KV head's query heads).
void turn_head_rows(Matrix& m, const ModelConfig& config, const std::vector<Matrix>& heads,
                    Algebra& algebra) {
  const int64_t width = config.head_dim, group = config.heads / config.kv_heads;
  Matrix slice(width, m.cols);
  for (int64_t h = 0; h < config.heads; ++h) {
    std::copy_n(m.row(h * width), width * m.cols, slice.data.data());
    const Matrix turned = algebra.multiply_transposed(heads[static_cast<size_t>(h / group)], slice);
    std::copy_n(turned.data.data(), width * m.cols, m.row(h * width));
  }
}

/// Columns of KV head g ← columns R (v's outputs, and its bias as a one-row matrix).
void turn_head_cols(Matrix& m, const ModelConfig& config, const std::vector<Matrix>& heads,
                    Algebra& algebra) {
  const int64_t width = config.head_dim;
  Matrix slice(m.rows, width);
  for (int64_t g = 0; g < config.kv_heads; ++g) {
    for (int64_t i = 0; i < m.rows; ++i) std::copy_n(m.row(i) + g * width, width, slice.row(i));
    const Matrix turned = algebra.multiply(slice, heads[static_cast<size_t>(g)]);
    for (int64_t i = 0; i < m.rows; ++i) std::copy_n(turned.row(i), width, m.row(i) + g * width);
  }
}

void scale_rows(Matrix& m, const float* gain) {
  if (!gain) return;
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = 0; j < m.cols; ++j) m.row(i)[j] *= static_cast<double>(gain[i]);
  }
}

class LayerFolder {
 public:
  LayerFolder(const FoldJob& job, int64_t l, Algebra& algebra, ThreadPool& pool,
              const std::function<void(FoldedTensor&&)>& emit)
      : job_(job),
        algebra_(algebra),
        pool_(pool),
        emit_(emit),
        prefix_("layers." + std::to_string(l) + "."),
        folded_(job.form == Form::folded),
        turns_stream_(!job.bases.stream.empty()),
        turns_heads_(!job.bases.heads.empty()),
        merges_gain_(turns_stream_ && !job.after_gain) {}

  void run() {
    for (const Group& group : job_.plan.groups) fold_group(group);
    const LayerWeights& w = job_.weights;
    if (!merges_gain_) {
      if (w.norm_attn) vector("norm_attn", w.norm_attn, job_.config.dim);
      if (w.norm_mlp) vector("norm_mlp", w.norm_mlp, job_.config.dim);
    }
    if (w.norm_q) vector("norm_q", w.norm_q, job_.config.head_dim);
    if (w.norm_k) vector("norm_k", w.norm_k, job_.config.head_dim);
    if (job_.plan.middle) adapter("middle", job_.bases.stream, job_.bases.mlp);
    if (job_.plan.adapter) adapter("adapter", job_.bases.last(), behind(Projection::down));
  }

 private:
  void vector(const std::string& name, const float* values, int64_t n) {
    emit_(vector_tensor(prefix_ + name, std::vector<double>(values, values + n)));
  }
  void matrix(const std::string& name, const Matrix& m, DType dtype) {
    emit_(stored_tensor(prefix_ + name, m, dtype, pool_));
  }
  /// (in, out) in the layout asked for.
  void placed(const std::string& name, const Matrix& m, Layout layout, DType dtype) {
    layout == Layout::channels ? matrix(name, m, dtype) : matrix(name, transposed(m), dtype);
  }
  /// A projection (in, out) as the plan's layer stores it.
  void projection(Projection p, const Matrix& m, DType dtype) {
    placed(projection_name(p), m, stored_layout(job_.plan, p), dtype);
  }

  /// The product that its dropped entries go through.
  void add_low_rank(Projection p, const Matrix& m, DType beside) {
    if (rank_ == 0) return;
    const DType dtype = job_.low_rank_type.value_or(beside);
    const auto [in, out] = job_.low_rank(p, m, rank_);
    const std::string name = projection_name(p);
    placed(name + ".low_in", in, low_in_layout(quantised(dtype)), dtype);
    matrix(name + ".low_out", out, dtype);
  }

  void adapter(const std::string& name, const Matrix& from, const Matrix& to) {
    Matrix change = algebra_.multiply_transposed(from, to);
    const DType dtype = job_.types.adapters.value_or(job_.weights[Projection::wo].dtype);
    if (quantised(dtype)) {
      Matrix top(std::min(kAdapterTop, change.rows), change.cols);
      std::swap_ranges(top.data.begin(), top.data.end(), change.data.begin());
      matrix(name + ".top", top, DType::f32);
    }
    matrix(name, change, dtype);
  }
  /// The stream's basis where projections read it, and that of the sum that o or down add to.
  const Matrix& stream(Site site) const { return site == Site::h1 ? job_.bases.stream : job_.bases.last(); }
  const Matrix& behind(Projection p) const {
    return p == Projection::down && job_.next ? job_.next->stream : job_.bases.last();
  }

  void fold_group(const Group& group) {
    const Site site = site_of(group.projections[0]);
    rank_ = group.rank;
    std::vector<double> square(static_cast<size_t>(projection_in(job_.config, group.projections[0])));
    for (Projection p : group.projections) fold_projection(p, group.rule.scaled ? &square : nullptr);
    const std::string first = projection_name(group.projections[0]);
    if (group.rule.scaled) {
      for (double& s : square) s = std::sqrt(s);
      emit_(vector_tensor(prefix_ + first + ".scale", square));
    }
    if (group.rule.rotated) {
      matrix(first + ".basis",
             site == Site::h2 ? block_diagonal(job_.config, job_.bases.heads) : stream(site), DType::f32);
    }
  }

  void fold_projection(Projection p, std::vector<double>* square) {
    const Weight& source = job_.weights[p];
    const Site site = site_of(p);
    const bool reads_stream = site == Site::h1 || site == Site::h3;
    Matrix m = widen_weight(source, pool_);
    if (reads_stream && merges_gain_)
      scale_rows(m, site == Site::h1 ? job_.weights.norm_attn : job_.weights.norm_mlp);
    if (!folded_) {
      // Weights with the gain merged are stored wide: simulate shows a choice without storage rounding.
      const DType as_it_is = reads_stream && merges_gain_ ? DType::f32 : source.dtype;
      projection(p, m, job_.types.weights.value_or(as_it_is));
      add_low_rank(p, m, job_.types.weights.value_or(as_it_is));
      if (source.bias) vector(std::string(projection_name(p)) + ".bias", source.bias, source.out);
    }
    turn_inputs(site, m);
    if (square) {
      for (int64_t i = 0; i < m.rows; ++i) {
        for (int64_t j = 0; j < m.cols; ++j) (*square)[static_cast<size_t>(i)] += m.row(i)[j] * m.row(i)[j];
      }
    }
    if (!folded_) return;
    turn_outputs(p, m);
    projection(p, m, job_.types.weights.value_or(source.dtype));
    add_low_rank(p, m, job_.types.weights.value_or(source.dtype));
    if (source.bias) {
      Matrix bias(1, source.out);
      std::copy_n(source.bias, source.out, bias.row(0));
      turn_outputs(p, bias);
      emit_(vector_tensor(prefix_ + projection_name(p) + ".bias", bias.data));
    }
  }

  void turn_inputs(Site site, Matrix& m) {
    const bool reads_stream = site == Site::h1 || site == Site::h3;
    if (reads_stream && turns_stream_) m = algebra_.multiply_transposed(stream(site), m);
    if (site == Site::h2 && turns_heads_) turn_head_rows(m, job_.config, job_.bases.heads, algebra_);
  }
  void turn_outputs(Projection p, Matrix& m) {
    if ((p == Projection::wo || p == Projection::down) && turns_stream_) m = algebra_.multiply(m, behind(p));
    if (p == Projection::wv && turns_heads_) turn_head_cols(m, job_.config, job_.bases.heads, algebra_);
  }

  const FoldJob& job_;
  Algebra& algebra_;
  ThreadPool& pool_;
  const std::function<void(FoldedTensor&&)>& emit_;
  const std::string prefix_;
  int64_t rank_ = 0;  // of the group at hand
  const bool folded_, turns_stream_, turns_heads_, merges_gain_;
};

}  // namespace

std::string type_name(const std::optional<DType>& dtype) {
  return dtype ? dtype_name(*dtype) : "source";
}

SafetensorsWriter::Entry stored_entry(const std::string& name, DType dtype, int64_t lines, int64_t n) {
  if (quantised(dtype)) return {name, DType::u8, {lines, line_bytes(dtype, n)}};
  return {name, dtype, {lines, n}};
}

FoldedTensor stored_tensor(const std::string& name, const Matrix& m, DType dtype, ThreadPool& pool) {
  const SafetensorsWriter::Entry entry = stored_entry(name, dtype, m.rows, m.cols);
  FoldedTensor tensor{name, entry.dtype, entry.shape, {}};
  if (!quantised(dtype)) {
    tensor.bytes = round_to(m, dtype, pool);
    return tensor;
  }
  const int64_t line = line_bytes(dtype, m.cols);
  tensor.bytes.resize(static_cast<size_t>(m.rows * line));
  pool.split(m.rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> values(static_cast<size_t>(m.cols));
    for (int64_t i = begin; i < end; ++i) {
      narrow(name, std::span(m.row(i), values.size()), values.data());
      quantise_line(values.data(), m.cols, dtype, tensor.bytes.data() + i * line);
    }
  });
  return tensor;
}

void fold_layer(const FoldJob& job, int64_t l, Algebra& algebra, ThreadPool& pool,
                const std::function<void(FoldedTensor&&)>& emit) {
  LayerFolder(job, l, algebra, pool, emit).run();
}

Matrix fold_rows(const Weight& table, int64_t first, int64_t count, const float* gain, const Matrix& basis,
                 Algebra& algebra, ThreadPool& pool) {
  Matrix m(count, table.in);
  pool.split(count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = 0; i < table.in; ++i) {
        m.row(t)[i] = static_cast<double>(load_element(table.data, table.dtype, (first + t) * table.in + i)) *
                      (gain ? static_cast<double>(gain[i]) : 1.0);
      }
    }
  });
  return basis.empty() ? m : algebra.multiply(m, basis);
}

}  // namespace larosa
