// Methods and budgets: bases, rivals, models that are trained to be sparse, thresholds, allocations.
#include "sparsify_fixture.h"

#include <functional>
#include <numeric>
#include <set>

#include "base/error.h"
#include "base/progress.h"
#include "base/quant.h"
#include "calib/sparsify.h"
#include "calib/statistics.h"
#include "eval/perplexity.h"

namespace larosa {
namespace {

class Methods : public Sparsify {
 protected:
  /// A text that no calibration has seen.
  PerplexityResult score(const Model& model) {
    PerplexityOptions scoring;
    scoring.context = kWindow;
    return perplexity(model, nullptr, *backend_, pool_, some_tokens(model.config.vocab, 16 * kWindow, 11),
                      scoring, [](const PerplexityResult&, int64_t) {});
  }
};

std::vector<SparsifyOptions> other_bases(double sparsity) {
  SparsifyOptions separate, grouped, one, wina;
  separate.choice.source = Source::separate;
  grouped.choice.basis_layers = 3;
  one.choice.basis_layers = 0;
  wina.method = "wina";
  std::vector<SparsifyOptions> all = {separate, grouped, one, wina};
  for (SparsifyOptions& options : all) options.choice.sparsity = sparsity;
  return all;
}

TEST_F(Methods, OtherBasesGiveTheOriginalLogits) {  // laws 1, 3 and 4
  for (const std::string& source : tiny_models()) {
    const Model original = load_model(source);
    const auto tokens = some_tokens(original.config.vocab, 24);
    const auto expected = all_logits(original, *backend_, tokens, tokens.size());
    for (SparsifyOptions options : other_bases(0)) {
      for (const auto& adapters : {std::optional<DType>(), std::optional(DType::int8)}) {
        options.types.adapters = adapters;
        TemporaryDir dir;
        make(source, dir / "out", options);
        const Model model = load_model(dir / "out");
        const auto found = all_logits(model, *backend_, tokens, tokens.size());
        EXPECT_LT(relative_rms(found, expected), adapters ? 0.06 : storage_tolerance(original)) << source;
        EXPECT_EQ(found, all_logits(model, *backend_, tokens, tokens.size(), true));
        EXPECT_LT(relative_rms(all_logits(model, *backend_, tokens, 5), found), 1e-4) << source;
      }
    }
  }
}

TEST_F(Methods, OtherBasesFoldedEqualSimulated) {
  const std::string source = source_path("tests/golden/models/llama3.1-f32");
  const auto tokens = some_tokens(load_config(source).vocab, 24);
  for (SparsifyOptions options : other_bases(0.4)) {
    TemporaryDir dir;
    make(source, dir / "folded", options);
    options.choice.form = Form::simulate;
    make(source, dir / "simulate", options);
    const auto folded = all_logits(load_model(dir / "folded"), *backend_, tokens, tokens.size());
    const auto simulated = all_logits(load_model(dir / "simulate"), *backend_, tokens, tokens.size());
    EXPECT_LT(relative_rms(folded, simulated), 1e-3) << options.method;
  }
}

TEST_F(Methods, AdaptersStandWhereBasesChange) {
  const auto adapters = [&](const SparsifyOptions& options) {
    TemporaryDir dir;
    make(demo_model(), dir / "out", options);
    const Model model = load_model(dir / "out");
    std::string text;
    for (const Layer& layer : model.layers) {
      EXPECT_EQ(bool(layer.middle), layer.plan.middle);
      EXPECT_EQ(bool(layer.adapter), layer.plan.adapter);
      text += layer.middle ? "m" : ".";
      text += layer.adapter ? "a" : ".";
    }
    EXPECT_EQ(token_bytes(model).adapters,
              256 * 256 * 2 * std::count_if(text.begin(), text.end(), [](char c) { return c != '.'; }));
    EXPECT_EQ(model_bytes(model), model.checkpoint->bytes());
    return text;
  };
  const std::vector<SparsifyOptions> options = other_bases(0.5);
  EXPECT_EQ(adapters(options[0]), "mamamamamamamam.");
  EXPECT_EQ(adapters(options[1]), ".....a.....a....");
  EXPECT_EQ(adapters(options[2]), "................");
  EXPECT_EQ(adapters(options[3]), "mamamamamamamam.");
}

/// Without its adapter a layer still leaves in the next basis what its projection adds.
TEST_F(Methods, AdaptersTurnTheSkipPathAlone) {
  struct Middle : Observer {
    void see(Site site, Mat, Mat stream) override {
      if (site == Site::h3) rows.assign(stream.data, stream.data + stream.rows * stream.cols);
    }
    std::vector<float> rows;
  };
  TemporaryDir dir;
  SparsifyOptions options = with_sparsity(0.5);
  options.choice.source = Source::separate;
  make(demo_model(), dir / "out", options);
  Model model = load_model(dir / "out");
  const ModelConfig& c = model.config;
  const auto tokens = some_tokens(c.vocab, kWindow, 3);
  Layer& layer = model.layers[0];
  Decoder decoder(c, *backend_);
  Middle middle;
  const auto run = [&] {
    std::vector<float> rows(static_cast<size_t>(kWindow * c.dim));
    const Mat x(rows.data(), kWindow, c.dim);
    const auto cache = backend_->make_kv_cache({1, c.kv_heads, c.head_dim, kWindow, DType::f32});
    decoder.embed(model.outer, tokens, x);
    const Mat last = decoder.layer(layer, 0, *cache, 0, 0, x, Pass{false, &middle});
    return std::vector<float>(last.data, last.data + rows.size());
  };
  /// With `adapter` zero, and `before` through it.
  const std::vector<float> zero(static_cast<size_t>(c.dim * c.dim));
  const auto sum = [&](Adapter& adapter, std::vector<float> before, const auto& result) {
    const Adapter whole =
        std::exchange(adapter, {{zero.data(), nullptr, DType::f32, Layout::channels, c.dim, c.dim}, {}});
    std::vector<float> added = result(), turned(before.size());
    adapter = whole;
    decoder.adapt(whole, Mat(before.data(), kWindow, c.dim), Mat(turned.data(), kWindow, c.dim));
    for (size_t i = 0; i < added.size(); ++i) added[i] += turned[i];
    return added;
  };
  std::vector<float> embedded(static_cast<size_t>(kWindow * c.dim));
  decoder.embed(model.outer, tokens, Mat(embedded.data(), kWindow, c.dim));
  const auto at_middle = [&] { return run(), middle.rows; };
  const std::vector<float> last = run(), seen = middle.rows;
  EXPECT_LT(relative_rms(sum(layer.middle, embedded, at_middle), seen), 1e-5);
  EXPECT_LT(relative_rms(sum(layer.adapter, seen, run), last), 1e-5);
}

/// H of one site of a layer, dense, of the normalised stream times `gain` (null: ones); in plain sums.
struct SecondMoment : Observer {
  SecondMoment(Site at, const float* times, float norm_eps, int64_t dim)
      : site(at), gain(times), eps(norm_eps), sum(dim, dim) {}
  void see(Site where, Mat, Mat stream) override {
    if (where != site) return;
    for (int64_t t = 0; t < stream.rows; ++t) {
      const float* x = stream.row(t);
      double size = eps;
      for (int64_t i = 0; i < stream.cols; ++i)
        size += double{x[i]} * x[i] / static_cast<double>(stream.cols);
      for (int64_t i = 0; i < stream.cols; ++i)
        for (int64_t j = 0; j < stream.cols; ++j)
          sum.row(i)[j] += double{x[i]} * x[j] / size * (gain ? double{gain[i]} * gain[j] : 1.0);
    }
  }
  Site site;
  const float* gain;
  double eps;
  Matrix sum;
};

/// --basis-weights: the stored basis diagonalises H + λ G, both of mean diagonal 1, with descending values.
TEST_F(Methods, BasesOfDataAndWeights) {
  const std::string source = source_path("tests/golden/models/llama3.1-f32");
  const Model model = load_model(source);
  const ModelConfig& c = model.config;
  const auto tokens = some_tokens(c.vocab, 8 * kWindow, 7);  // as Sparsify::make
  const auto moment = [&](int64_t l, Site site, const float* gain) {
    SecondMoment found(site, gain, c.norm_eps, c.dim);
    Decoder decoder(c, *backend_);
    for (size_t w = 0; w < 8; ++w) {
      std::vector<float> rows(static_cast<size_t>(kWindow * c.dim));
      Mat x(rows.data(), kWindow, c.dim);
      decoder.embed(model.outer, std::span(tokens).subspan(w * kWindow, kWindow), x);
      const auto cache = backend_->make_kv_cache({c.layers, c.kv_heads, c.head_dim, kWindow, DType::f32});
      for (int64_t k = 0; k <= l; ++k)
        x = decoder.layer(model.layers[static_cast<size_t>(k)], k, *cache, k, 0, x,
                          Pass{true, k == l ? &found : nullptr});
    }
    return found.sum;
  };
  const auto gram = [&](int64_t l, std::vector<Projection> readers, const float* gain) {
    Matrix sum(c.dim, c.dim);
    for (const Projection p : readers) {
      const Weight& w = model.layers[static_cast<size_t>(l)].weights[p];
      const std::vector<float> values = read_weight(w);
      const auto at = [&](int64_t n, int64_t i) {
        return double{values[static_cast<size_t>(w.layout == Layout::rows ? n * w.in + i : i * w.out + n)]} *
               (gain ? double{gain[i]} : 1.0);
      };
      for (int64_t n = 0; n < w.out; ++n)
        for (int64_t i = 0; i < c.dim; ++i)
          for (int64_t j = 0; j < c.dim; ++j) sum.row(i)[j] += at(n, i) * at(n, j);
    }
    return sum;
  };
  const auto add = [](Matrix& sum, const Matrix& m, double factor = 1) {
    for (size_t i = 0; i < m.data.size(); ++i) sum.data[i] += factor * m.data[i];
  };
  const auto trace = [](const Matrix& m) {
    double sum = 0;
    for (int64_t i = 0; i < m.rows; ++i) sum += m.row(i)[i];
    return sum;
  };
  using enum Projection;
  constexpr double kShare = 0.7;
  struct Case {
    Source from;
    int layers;
    bool gained;  // moments of what the gain has multiplied, and weights as they are
  };
  for (const auto& [from, layers, gained] : {Case{Source::pooled, 1, false},
                                             {Source::pooled, 0, false},
                                             {Source::h1, 1, false},
                                             {Source::separate, 1, false},
                                             {Source::pooled, 1, true}}) {
    SparsifyOptions options = with_sparsity(0.5);
    options.choice.form = Form::simulate;  // stores its bases
    options.choice.source = from;
    options.choice.basis_layers = layers;
    options.choice.basis_weights = kShare;
    options.choice.after_gain = gained;
    TemporaryDir dir;
    make(source, dir / "out", options);
    const Model made = load_model(dir / "out");
    EXPECT_EQ(made.plan.notes.at("basis_weights"), "0.7");
    for (const size_t g : {size_t{0}, size_t{2}}) {  // q k v, and gate up
      Matrix data(c.dim, c.dim), weights(c.dim, c.dim);
      for (int64_t l = 0; l < (layers == 0 ? c.layers : 1); ++l) {
        const LayerWeights& w = model.layers[static_cast<size_t>(l)].weights;
        const bool first = from != Source::separate || g == 0, second = from != Source::separate || g == 2;
        const auto of_data = [&](const float* gain) { return gained ? gain : nullptr; };
        const auto of_weights = [&](const float* gain) { return gained ? nullptr : gain; };
        if (first) add(data, moment(l, Site::h1, of_data(w.norm_attn)));
        if (second && from != Source::h1) add(data, moment(l, Site::h3, of_data(w.norm_mlp)));
        if (first) add(weights, gram(l, {wq, wk, wv}, of_weights(w.norm_attn)));
        if (second) add(weights, gram(l, {gate, up}, of_weights(w.norm_mlp)));
      }
      Matrix mixed(c.dim, c.dim);
      add(mixed, data, 1 / trace(data));
      add(mixed, weights, kShare / trace(weights));
      const std::vector<float> basis = read_weight(made.layers[0].groups[g].basis);  // (D, D) channels
      double before = 1, off = 0;
      for (int64_t a = 0; a < c.dim; ++a) {
        std::vector<double> turned(static_cast<size_t>(c.dim));
        for (int64_t i = 0; i < c.dim; ++i)
          for (int64_t j = 0; j < c.dim; ++j)
            turned[static_cast<size_t>(i)] +=
                mixed.row(i)[j] * double{basis[static_cast<size_t>(j * c.dim + a)]};
        for (int64_t b = 0; b < c.dim; ++b) {
          double value = 0;
          for (int64_t i = 0; i < c.dim; ++i)
            value += double{basis[static_cast<size_t>(i * c.dim + b)]} * turned[static_cast<size_t>(i)];
          if (a != b) off = std::max(off, std::abs(value));
          if (a == b) {
            EXPECT_LE(value, before * (1 + 1e-6));
            before = value;
          }
        }
      }
      EXPECT_LT(off, 1e-6 * trace(mixed)) << g;
    }
  }
  SparsifyOptions options = with_sparsity(0.5);
  options.choice.basis_weights = -1;
  EXPECT_NE(message_of([&] { make(source, "unused", options); }).find("--basis-weights -1"),
            std::string::npos);
}

/// WINA: channels of k and gate are orthogonal, and their norms alone score.
TEST_F(Methods, WinaMakesChannelsOrthogonal) {
  TemporaryDir dir;
  SparsifyOptions options;
  options.method = "wina";
  options.types.weights = DType::f32;
  make(demo_model(), dir / "out", options);
  const Model model = load_model(dir / "out");
  for (const Layer& layer : model.layers) {
    for (const Projection p : {Projection::wk, Projection::gate}) {
      const Weight& w = layer.weights[p];
      const auto group =
          std::find_if(layer.plan.groups.begin(), layer.plan.groups.end(),
                       [&](const Group& g) { return g.projections == std::vector<Projection>{p}; });
      ASSERT_NE(group, layer.plan.groups.end());
      EXPECT_TRUE(group->rule.scaled);
      const auto* scale = layer.groups[static_cast<size_t>(group - layer.plan.groups.begin())].scale;
      const auto dot = [&](int64_t a, int64_t b) {
        double sum = 0;
        for (int64_t j = 0; j < w.out; ++j)
          sum += static_cast<double>(load_element(w.data, w.dtype, a * w.out + j)) *
                 static_cast<double>(load_element(w.data, w.dtype, b * w.out + j));
        return sum;
      };
      const double largest = dot(0, 0);
      for (int64_t i = 0; i < w.in; i += 17) {
        EXPECT_NEAR(scale[i], std::sqrt(dot(i, i)), 1e-5 * std::sqrt(largest));
        for (int64_t j = i + 1; j < w.in; j += 31) EXPECT_LT(std::abs(dot(i, j)), 1e-5 * largest);
      }
    }
    EXPECT_EQ(std::count_if(layer.plan.groups.begin(), layer.plan.groups.end(),
                            [](const Group& g) { return g.rule.scaled; }),
              2);
  }
}

/// Neurons left out, and dropped entries through products of low rank: the budget with everything that is
/// read.
TEST_F(Methods, CatsAndRsparseReachTheirBudget) {
  for (const auto& [method, sparsity, type] : {std::tuple{"cats", 0.3, DType::bf16},
                                               {"cats", 0.3, DType::int4},
                                               {"rsparse", 0.4, DType::bf16},
                                               {"rsparse", 0.4, DType::int8}}) {
    SCOPED_TRACE(std::string(method) + " " + dtype_name(type));
    TemporaryDir dir;
    SparsifyOptions options = with_sparsity(sparsity);
    options.method = method;
    options.types.weights = type;
    options.choice.mix = 0.8;
    make(demo_model(), dir / "out", options);
    const Model model = load_model(dir / "out");
    EXPECT_NEAR(weight_sparsity(model.plan, plan_shape(model.config)), sparsity, 0.01);
    EXPECT_NEAR(token_bytes(model).sparsity(), sparsity, 0.01);
    EXPECT_EQ(token_bytes(model).low_rank > 0, std::string(method) == "rsparse");
    EXPECT_EQ(model_bytes(model), model.checkpoint->bytes());
    const auto tokens = some_tokens(model.config.vocab, 4);
    const auto dense = all_logits(model, *backend_, tokens, tokens.size(), true);
    const auto sparse = all_logits(model, *backend_, tokens, tokens.size());
    const double off = relative_rms(sparse, dense);
    EXPECT_GT(off, 0.01);
    EXPECT_LT(off, 0.7);
    // At 8 and 4 bits a row alone is rounded otherwise, and what stands close to a cut falls on its other
    // side.
    if (!quantised(type)) {
      EXPECT_LT(relative_rms(all_logits(model, *backend_, tokens, 1), sparse), 0.01);
    }
    const PerplexityResult r = score(model);
    EXPECT_NEAR(r.reached.value(), sparsity, 0.02);
    // What CATS leaves out of up are outputs, not entries of h3.
    EXPECT_EQ(r.reached_sites[2] > 0, std::string(method) == "rsparse");
    EXPECT_GT(r.reached_sites[3], 0.2);
  }
}

TEST_F(Methods, CatsAndRsparseRefuse) {
  const auto refused = [&](const char* method, double sparsity,
                           const std::function<void(SparsifyOptions&)>& change) {
    TemporaryDir dir;
    SparsifyOptions options = with_sparsity(sparsity);
    options.method = method;
    change(options);
    const std::string message = message_of([&] { make(demo_model(), dir / "out", options); });
    EXPECT_FALSE(std::filesystem::exists(dir / "out"));
    return message;
  };
  EXPECT_NE(refused("cats", 0.6, [](SparsifyOptions&) {}).find("expected at most 0.4"), std::string::npos);
  EXPECT_NE(
      refused("cats", 0.3, [](SparsifyOptions& o) { o.choice.allocation = Allocation::greedy; }).find("cats"),
      std::string::npos);
  EXPECT_NE(refused("rsparse", 0.3, [](SparsifyOptions& o) { o.choice.mix = 1.5; }).find("--mix 1.5"),
            std::string::npos);
}

/// Models that are trained to be sparse: what their own plan skips changes no bit, neither as they came nor
/// stored by channels (and `up` by outputs), where it is not read.
TEST_F(Methods, TrainedSparseEqualsDenseBitForBit) {
  for (const std::string& source : tiny_models("sparse")) {
    SCOPED_TRACE(source);
    TemporaryDir dir;
    SparsifyOptions options;
    options.method = "dense";
    make(source, dir / "out", options);
    options.types = {DType::int8, DType::int8, DType::int8, DType::int8};
    make(source, dir / "int8", options);
    const Model original = load_model(source), stored = load_model(dir / "out"),
                lines = load_model(dir / "int8");
    const auto tokens = some_tokens(original.config.vocab, 24);
    for (const Model* model : {&original, &stored, &lines}) {
      EXPECT_EQ(model->layers[0].plan, trained_layer(original.config));
      EXPECT_NE(model->layers[0].plan, dense_layer());
      for (const size_t chunk : {size_t{1}, size_t{7}, tokens.size()})
        EXPECT_EQ(all_logits(*model, *backend_, tokens, chunk),
                  all_logits(*model, *backend_, tokens, chunk, true));
    }
    const bool chooses = original.layers[0].plan.neurons.select != Select::all;
    EXPECT_EQ(chooses, original.config.sparse_ratio == 0);
    EXPECT_EQ(stored.layers[0].weights[Projection::up].layout, chooses ? Layout::rows : Layout::channels);
    EXPECT_EQ(lines.layers[0].weights[Projection::up].layout,
              stored.layers[0].weights[Projection::up].layout);
    if (chooses) {  // of up as well as of down, at 8 bits as the source
      const auto& weights = plan_shape(original.config).projection_weights;
      const double down = static_cast<double>(weights[static_cast<size_t>(Projection::down)]) /
                          static_cast<double>(std::accumulate(weights.begin(), weights.end(), int64_t{0}));
      const PerplexityResult whole = score(stored), eight_bits = score(lines);
      EXPECT_GT(whole.reached.value(), whole.reached_sites[3] * down + 0.05);
      EXPECT_NEAR(eight_bits.reached.value(), whole.reached.value(), 0.01);
    }
    const auto expected = all_logits(original, *backend_, tokens, 1);
    EXPECT_LT(relative_rms(all_logits(stored, *backend_, tokens, 1), expected), 1e-5);
    options.types = {};
    options.method = "larosa";
    if (chooses) {
      options.choice.sparsity = 0;
      make(source, dir / "folded", options);
      const auto found = all_logits(load_model(dir / "folded"), *backend_, tokens, tokens.size());
      EXPECT_LT(relative_rms(found, expected), storage_tolerance(original));
    } else {
      const std::string message = message_of([&] { make(source, dir / "folded", options); });
      EXPECT_NE(message.find("sparse_ratio"), std::string::npos) << message;
    }
  }
}

/// What is kept of a row of zeros has no length to be divided by: it stays zero.
TEST_F(Methods, RescaledZerosStayZero) {
  Model model = load_model(source_path("tests/golden/sparse/qsparse-rescaled-bf16"));
  ASSERT_TRUE(model.layers[0].plan.groups[0].rule.rescaled);
  const std::vector<float> zeros(static_cast<size_t>(model.config.vocab * model.config.dim));
  model.outer.embed.data = zeros.data();
  const auto tokens = some_tokens(model.config.vocab, 9);
  for (const size_t chunk : {size_t{1}, tokens.size()}) {
    for (const float logit : all_logits(model, *backend_, tokens, chunk)) ASSERT_TRUE(std::isfinite(logit));
  }
}

/// `up` by outputs goes through rounding by moments as well.
TEST_F(Methods, TrainedSparseIsRoundedByMoments) {
  TemporaryDir dir;
  SparsifyOptions options;
  options.method = "dense";
  options.types = {DType::int8, DType::int8, DType::int8, DType::int8};
  options.gptq = true;
  const std::string source = source_path("tests/golden/sparse/relu-f32");
  make(source, dir / "out", options);
  const Model original = load_model(source), rounded = load_model(dir / "out");
  const auto tokens = some_tokens(original.config.vocab, 24);
  EXPECT_LT(
      relative_rms(all_logits(rounded, *backend_, tokens, 24), all_logits(original, *backend_, tokens, 24)),
      0.06);
}

TEST_F(Methods, ThresholdsReachTheirBudgetOnOtherText) {  // law 7
  const auto reached = [&](const std::string& source, const SparsifyOptions& options) {
    TemporaryDir dir;
    make(source, dir / "out", options);
    const Model model = load_model(dir / "out");
    EXPECT_NEAR(weight_sparsity(model.plan, plan_shape(model.config)), options.choice.sparsity, 0.005);
    return score(model).reached.value();
  };
  for (const double sparsity : {0.25, 0.75})
    EXPECT_NEAR(reached(demo_model(), teal(sparsity)), sparsity, 0.01);
  const std::string tiny = tiny_models().front();
  EXPECT_NEAR(reached(tiny, teal(0.4, Allocation::greedy)), 0.4, 0.01);
}

TEST_F(Methods, ThresholdsThatDropNothingEqualDense) {  // law 1
  TemporaryDir dir;
  make(demo_model(), dir / "out", teal(0));
  const Model model = load_model(dir / "out");
  EXPECT_EQ(model.plan.layers[0].groups.size(), 7u);
  const auto tokens = some_tokens(model.config.vocab, 12);
  EXPECT_EQ(all_logits(model, *backend_, tokens, 12), all_logits(model, *backend_, tokens, 12, true));
}

TEST_F(Methods, AdaptersCountInTheBudget) {
  for (const auto& adapters : {std::optional<DType>(), std::optional(DType::int8)}) {
    for (const Source source : {Source::pooled, Source::separate}) {
      TemporaryDir dir;
      SparsifyOptions options = with_sparsity(0.4);
      options.count_adapters = true;
      options.types.adapters = adapters;
      options.choice.source = source;
      make(demo_model(), dir / "out", options);
      const Model model = load_model(dir / "out");
      const TokenBytes bytes = token_bytes(model);
      EXPECT_GT(bytes.adapters, 0);
      EXPECT_NEAR(static_cast<double>(bytes.projections + bytes.adapters) /
                      static_cast<double>(bytes.projections_dense),
                  0.6, 0.005);
      EXPECT_EQ(model.plan.sparsity, 0.4);
      EXPECT_EQ(model.plan.notes.at("budget"), "with adapters");
    }
  }
  SparsifyOptions options = with_sparsity(0.94);
  options.count_adapters = true;
  TemporaryDir dir;
  EXPECT_NE(message_of([&] { make(demo_model(), dir / "out", options); }).find("--budget-includes-adapter"),
            std::string::npos);
}

TEST_F(Methods, AllocationsReachTheBudget) {  // law 7
  const std::string source = source_path("tests/golden/models/llama3.1-f32");
  for (const char* method : {"larosa", "wina"}) {
    for (const Allocation allocation : {Allocation::greedy, Allocation::lagrangian}) {
      TemporaryDir dir;
      SparsifyOptions options = with_sparsity(0.5);
      options.method = method;
      options.choice.allocation = allocation;
      options.choice.currency = Currency::relative;
      make(source, dir / "out", options);
      const Model model = load_model(dir / "out");
      EXPECT_NEAR(weight_sparsity(model.plan, plan_shape(model.config)), 0.5, 0.01) << method;
      std::set<int64_t> keeps;
      for (const LayerPlan& layer : model.plan.layers) {
        for (const Group& group : layer.groups)
          if (group.projections[0] == Projection::gate) keeps.insert(group.rule.keep);
      }
      if (allocation == Allocation::lagrangian) {  // layers differ
        EXPECT_GT(keeps.size(), 1u);
      }
    }
  }
}

TEST_F(Methods, WithoutACurrencyEveryLayerMeetsTheBudget) {
  TemporaryDir dir;
  SparsifyOptions options = with_sparsity(0.5);
  options.choice.allocation = Allocation::lagrangian;
  options.choice.currency = Currency::none;
  make(source_path("tests/golden/models/llama3.1-f32"), dir / "out", options);
  const Model model = load_model(dir / "out");
  for (const LayerPlan& layer : model.plan.layers)
    EXPECT_NEAR(weight_sparsity(layer, plan_shape(model.config)), 0.5, 0.01);
}

TEST_F(Methods, LevelsShrinkToTheUniformOnes) {
  const auto keeps = [&](Allocation allocation, double shrink) {
    TemporaryDir dir;
    SparsifyOptions options = with_sparsity(0.5);
    options.choice.allocation = allocation;
    options.choice.shrink = shrink;
    make(source_path("tests/golden/models/llama3.1-f32"), dir / "out", options);
    std::vector<int64_t> found;
    for (const LayerPlan& layer : load_model(dir / "out").plan.layers)
      for (const Group& group : layer.groups) found.push_back(group.rule.keep);
    return found;
  };
  const auto none = keeps(Allocation::lagrangian, 0), half = keeps(Allocation::lagrangian, 0.5);
  const auto uniform = keeps(Allocation::uniform, 0);
  EXPECT_EQ(keeps(Allocation::lagrangian, 1), uniform);
  EXPECT_NE(none, uniform);
  for (size_t i = 0; i < half.size(); ++i)
    EXPECT_NEAR(static_cast<double>(half[i]), 0.5 * static_cast<double>(none[i] + uniform[i]), 1.01) << i;
  SparsifyOptions options = with_sparsity(0.5);
  options.choice.shrink = 1.5;
  EXPECT_NE(message_of([&] { make(demo_model(), "unused", options); }).find("--shrink"), std::string::npos);
}

/// The plan is the one that the scales it names give; all layers have it, and it meets the budget.
TEST_F(Methods, SearchedSiteScalesAreNamed) {  // law 7
  const std::string source = source_path("tests/golden/models/llama3.1-f32");
  for (const char* method : {"larosa", "topk", "wina"}) {
    SCOPED_TRACE(method);
    TemporaryDir dir;
    SparsifyOptions options = with_sparsity(0.5);
    options.method = method;
    options.choice.allocation = Allocation::sites;
    options.choice.currency = Currency::relative;
    options.choice.shrink = 0;
    make(source, dir / "out", options);
    const Model model = load_model(dir / "out");
    EXPECT_NEAR(weight_sparsity(model.plan, plan_shape(model.config)), 0.5, 0.01);
    for (const LayerPlan& layer : model.plan.layers) EXPECT_EQ(layer.groups, model.plan.layers[0].groups);
    const std::string named = model.plan.notes.at("site_scale");
    EXPECT_EQ(model.plan.notes.at("allocation"), "site scales");
    options.choice.allocation = Allocation::uniform;
    auto& scale = options.choice.site_scale;
    ASSERT_EQ(std::sscanf(named.c_str(), "%lf,%lf,%lf,%lf", &scale[0], &scale[1], &scale[2], &scale[3]), 4);
    EXPECT_NE(scale, Choice{}.site_scale);
    make(source, dir / "named", options);
    const Model again = load_model(dir / "named");
    EXPECT_EQ(again.plan.layers, model.plan.layers);
    EXPECT_EQ(again.plan.notes.at("site_scale"), named);
  }
  for (const char* method : {"teal", "cats", "rsparse"}) {
    SparsifyOptions options = with_sparsity(0.3);
    options.method = method;
    options.choice.allocation = Allocation::sites;
    const std::string message = message_of([&] { make(source, "unused", options); });
    EXPECT_NE(message.find("--site-scale search: method " + std::string(method)), std::string::npos)
        << message;
  }
}

/// What one sparsity leaves, another takes: the same bytes as without, and nothing of another job.
TEST_F(Methods, BasesAndCurvesServeEverySparsity) {
  TemporaryDir dir;
  const std::string source = source_path("tests/golden/models/llama3.1-f32");
  SparsifyOptions options = with_sparsity(0.5);
  options.choice.allocation = Allocation::lagrangian;
  make(source, dir / "alone", options);
  options.kept = dir / "kept";
  options.choice.sparsity = 0.3;
  make(source, dir / "first", options);
  options.choice.sparsity = 0.5;
  make(source, dir / "out", options);
  expect_same_files(dir / "alone", dir / "out");
  const Choice same = options.choice;
  for (const bool weights : {false, true}) {
    if (weights) options.choice.basis_weights = 0.1;
    if (!weights) options.choice.rotate_h2 = false;
    EXPECT_NE(message_of([&] { make(source, dir / "other", options); }).find("begun with other options"),
              std::string::npos);
    options.choice = same;
  }
  for (const char* name : {"curves-1.json", "basis-1.safetensors"}) {
    const std::string file = dir / (std::string("kept/") + name);
    const std::string bytes = file_bytes(file);
    std::ofstream(file) << "[[1]]";
    EXPECT_NE(message_of([&] { make(source, dir / "other", options); }).find(name), std::string::npos);
    std::ofstream(file, std::ios::binary) << bytes;
  }
  make(source, dir / "other", options);
  expect_same_files(dir / "alone", dir / "other");
  std::filesystem::create_directory(dir / "strange");
  std::filesystem::copy_file(dir / "kept/basis-0.safetensors", dir / "strange/basis-0.safetensors");
  options.kept = dir / "strange";
  EXPECT_NE(message_of([&] { make(source, dir / "last", options); }).find("begun with other options"),
            std::string::npos);
}

/// Where no rank is left the plan says nothing of the mix.
TEST_F(Methods, ProductsOfLowRankServeEverySparsity) {
  TemporaryDir dir;
  SparsifyOptions options = with_sparsity(0.5);
  options.method = "rsparse";
  options.kept = dir / "kept";
  make(demo_model(), dir / "first", options);
  options.choice.sparsity = 0.95;
  make(demo_model(), dir / "second", options);  // would throw if the job of `kept` hung on the budget
  EXPECT_TRUE(std::filesystem::exists(dir / "second"));
}

/// A trial tells a layer's plans apart as the layer itself does.
TEST_F(Methods, TrialsMeasureTheLayersOutput) {
  TemporaryDir dir;
  make(demo_model(), dir / "out", with_sparsity(0.5));
  Model model = load_model(dir / "out");
  const auto tokens = some_tokens(model.config.vocab, 4 * kWindow, 3);
  const auto algebra = backend_->make_algebra(pool_);
  Calibration calibration(model.outer, model.config, *backend_, *algebra, tokens, kWindow);
  const LayerPlan sparse = model.layers[0].plan;
  Trial trial = calibration.trial(model.layers[0], 0);
  LayerPlan whole = sparse, half = sparse;
  for (Group& group : whole.groups) group.rule.select = Select::all;
  for (size_t g = 1; g < half.groups.size(); ++g) half.groups[g].rule.select = Select::all;
  EXPECT_EQ(trial.error(whole).relative, 0);
  EXPECT_EQ(trial.error(whole).absolute, 0);
  EXPECT_EQ(trial.error(whole).update, 0);
  EXPECT_GT(trial.error(half).update, 0);
  EXPECT_GT(trial.error(sparse).update, trial.error(half).update);
  EXPECT_GT(trial.error(half).relative, 0);
  EXPECT_GT(trial.error(sparse).relative, trial.error(half).relative);
  EXPECT_EQ(model.layers[0].plan, sparse);
  // The same number by hand, from the first and third windows.
  double expected = 0;
  for (const size_t w : {0, 2}) {
    std::vector<float> found(static_cast<size_t>(kWindow * model.config.dim)), dense(found.size());
    for (auto* rows : {&found, &dense}) {
      Decoder decoder(model.config, *backend_);
      std::vector<float> input(rows->size());
      const Mat x(input.data(), kWindow, model.config.dim);
      const auto cache =
          backend_->make_kv_cache({1, model.config.kv_heads, model.config.head_dim, kWindow, DType::f32});
      decoder.embed(model.outer, std::span(tokens).subspan(w * kWindow, kWindow), x);
      const Mat last = decoder.layer(model.layers[0], 0, *cache, 0, 0, x, Pass{rows == &dense, nullptr});
      std::copy_n(last.data, rows->size(), rows->data());
    }
    for (int64_t t = 0; t < kWindow; ++t) {
      const auto row = [&](const std::vector<float>& m) {
        return std::vector<float>(m.begin() + t * model.config.dim, m.begin() + (t + 1) * model.config.dim);
      };
      expected += std::pow(relative_rms(row(found), row(dense)), 2) / (2 * kWindow);
    }
  }
  EXPECT_NEAR(trial.error(sparse).relative, expected, 1e-9 * expected);
}

TEST(UniformLevels, UseTheWholeBudget) {
  const ModelConfig config = load_config(demo_model());
  const Levels uniform = uniform_levels(config, 0.5, {1, 1, 1, 1});
  for (const Projection p : kProjections) {
    const int64_t in = projection_in(config, p);
    EXPECT_EQ(keep_of(in, uniform[static_cast<size_t>(p)]), in / 2);
  }
  const Levels capped = uniform_levels(config, 0.9, {1, 100, 1, 1});
  EXPECT_EQ(keep_of(256, capped[static_cast<size_t>(Projection::wo)]), std::llround(256 * 0.05));
  EXPECT_EQ(keep_of(10, 1.0), 1);
  EXPECT_THROW(uniform_levels(config, 0.9, {1, 0, 0, 0}), Error);
}

}  // namespace
}  // namespace larosa
