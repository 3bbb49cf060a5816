// Where rotations disappear into weights. Everything in float64, rounded once when stored.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "calib/methods.h"
#include "io/safetensors.h"
#include "model/weights.h"

namespace larosa {

class Algebra;
class ThreadPool;

/// Types to store a model's tensors in, by class; nothing: as the source has them.
struct StoredTypes {
  std::optional<DType> weights;  // the seven projections
  std::optional<DType> adapters, head, embed;
};

/// For people: "int8", or "source" where the source's types are kept.
std::string type_name(const std::optional<DType>& dtype);

/// What happens to one layer's weights. Row vectors: stored (in, out), Wt' = B_inᵀ diag(gain) Wt B_out.
struct FoldJob {
  const ModelConfig& config;
  const LayerWeights& weights;  // the source's layer
  const Bases& bases;           // this layer's
  const Bases* next;            // the next layer's, where an adapter leads there; null: none
  const LayerPlan& plan;
  Form form;
  bool after_gain;  // simulate: thin after the gain, so the gain stays where it is
  StoredTypes types = {};
  std::optional<DType> low_rank_type = {};  // nothing: as the projection beside it
  /// The product of low rank nearest to a projection's folded weights (in, out).
  std::function<std::pair<Matrix, Matrix>(Projection, const Matrix&, int64_t rank)> low_rank;
};

/// A finished tensor, in the words of docs/formats.md.
struct FoldedTensor {
  std::string name;  // "layers.3.wq"
  DType dtype;
  std::vector<int64_t> shape;
  std::vector<std::byte> bytes;
};

/// What a file says of `lines` lines of n values of a type: quantised lines are plain bytes.
SafetensorsWriter::Entry stored_entry(const std::string& name, DType dtype, int64_t lines, int64_t n);

/// Rows of m rounded once to dtype, or quantised row by row. Throws Error naming the tensor when a value to
/// be quantised is not finite.
FoldedTensor stored_tensor(const std::string& name, const Matrix& m, DType dtype, ThreadPool& pool);

/// All tensors of layer l:
/// - folded: q, k, v, gate, up take Q_lᵀ diag(gain); o and down take on their outputs the basis behind them,
///   the MLP's and the next layer's, into which an adapter turns the skip path, Q_lᵀ Q_next (LaRoSA §4.2,
///   arXiv 2507.01299, with every gain folded first); v and o take the head bases.
/// - simulate: the weights stay (the gain is merged in float32 unless after_gain) and the bases are stored.
/// Score weights are the norms of the channels that Top-K chooses among, over all projections of the group.
/// emit() takes them one by one, so that only one projection is in memory.
void fold_layer(const FoldJob& job, int64_t l, Algebra& algebra, ThreadPool& pool,
                const std::function<void(FoldedTensor&&)>& emit);

/// rows [first, first + count) of a (vocab, dim) table times diag(gain) times the basis. gain null: ones;
/// basis empty: identity.
Matrix fold_rows(const Weight& table, int64_t first, int64_t count, const float* gain, const Matrix& basis,
                 Algebra& algebra, ThreadPool& pool);

/// True when folding rewrites the stream's basis (so embedding, head and gains must follow).
inline bool rewrites_stream(Form form, const Bases& bases) {
  return form == Form::folded && !bases.stream.empty();
}

}  // namespace larosa
