// sparsify as a whole: the laws that hold between a model and what is made from it, interruption, bad input.
#include "calib/sparsify.h"
#include "calib/statistics.h"
#include "eval/perplexity.h"

#include <sys/resource.h>
#include <sys/wait.h>

#include <chrono>
#include <csignal>
#include <functional>
#include <set>
#include <thread>
#include <tuple>

#include "base/error.h"
#include "base/progress.h"
#include "base/quant.h"
#include "model_fixture.h"

namespace larosa {
namespace {

constexpr int64_t kWindow = 32;

class Sparsify : public testing::Test {
 protected:
  void make(const std::string& source, const std::string& output, const SparsifyOptions& base,
            int threads = 2) {
    ThreadPool pool(threads);
    const auto backend = make_cpu_backend({}, pool);
    SparsifyOptions options = base;
    options.source = source;
    options.output = output;
    options.progress = false;
    const auto tokens = some_tokens(load_config(source).vocab, 8 * kWindow, 7);
    sparsify(options, tokens, kWindow, *backend, pool);
  }
  static SparsifyOptions with_sparsity(double sparsity) {
    SparsifyOptions options;
    options.choice.sparsity = sparsity;
    return options;
  }
  ThreadPool pool_{2};
  std::unique_ptr<Backend> backend_ = make_cpu_backend({}, pool_);
};

/// Law 3's tolerance: one rounding of every weight to storage, a few dozen products deep.
double storage_tolerance(const Model& model) {
  switch (model.layers[0].weights[Projection::wq].dtype) {
    case DType::f32:
      return 2e-5;
    case DType::f16:
      return 5e-3;
    default:
      return 4e-2;
  }
}

TEST_F(Sparsify, KeepingEverythingGivesTheOriginalLogits) {  // law 3, every family
  for (const std::string& source : tiny_models()) {
    const Model original = load_model(source);
    const auto tokens = some_tokens(original.config.vocab, 24);
    const auto expected = all_logits(original, *backend_, tokens, tokens.size());
    for (const Form form : {Form::folded, Form::simulate}) {
      TemporaryDir dir;
      SparsifyOptions options = with_sparsity(0);
      options.choice.form = form;
      make(source, dir / "out", options);
      const auto found = all_logits(load_model(dir / "out"), *backend_, tokens, tokens.size());
      EXPECT_LT(relative_rms(found, expected), storage_tolerance(original)) << source;
    }
  }
}

TEST_F(Sparsify, FoldedEqualsSimulatedOfTheSameChoice) {
  int compared = 0;
  for (const std::string& source : tiny_models()) {
    const Model original = load_model(source);
    if (original.layers[0].weights[Projection::wq].dtype != DType::f32)
      continue;  // rounding would flip near-ties
    TemporaryDir dir;
    SparsifyOptions options = with_sparsity(0.4);
    make(source, dir / "folded", options);
    options.choice.form = Form::simulate;
    make(source, dir / "simulate", options);
    const auto tokens = some_tokens(original.config.vocab, 24);
    const auto folded = all_logits(load_model(dir / "folded"), *backend_, tokens, tokens.size());
    const auto simulated = all_logits(load_model(dir / "simulate"), *backend_, tokens, tokens.size());
    EXPECT_LT(relative_rms(folded, simulated), 1e-3) << source;
    EXPECT_GT(relative_rms(folded, all_logits(original, *backend_, tokens, tokens.size())), 1e-2) << source;
    ++compared;
  }
  EXPECT_GT(compared, 0);
}

TEST_F(Sparsify, KeepAllEqualsDenseBitForBit) {  // law 1
  TemporaryDir dir;
  make(demo_model(), dir / "out", with_sparsity(0));
  const Model model = load_model(dir / "out");
  EXPECT_EQ(model.layers[0].plan.groups[0].rule.select, Select::topk);
  const auto tokens = some_tokens(model.config.vocab, 12);
  EXPECT_EQ(all_logits(model, *backend_, tokens, 1), all_logits(model, *backend_, tokens, 1, true));
  EXPECT_EQ(all_logits(model, *backend_, tokens, 12), all_logits(model, *backend_, tokens, 12, true));
}

/// Methods that turn the stream in other ways than the default.
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

TEST_F(Sparsify, OtherBasesGiveTheOriginalLogits) {  // laws 1, 3 and 4
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

TEST_F(Sparsify, OtherBasesFoldedEqualSimulated) {
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

TEST_F(Sparsify, AdaptersStandWhereBasesChange) {
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

/// WINA: channels of k and gate are orthogonal, and their norms alone score.
TEST_F(Sparsify, WinaMakesChannelsOrthogonal) {
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
TEST_F(Sparsify, CatsAndRsparseReachTheirBudget) {
  for (const auto& [method, sparsity] : {std::pair{"cats", 0.3}, {"rsparse", 0.4}}) {
    SCOPED_TRACE(method);
    TemporaryDir dir;
    SparsifyOptions options = with_sparsity(sparsity);
    options.method = method;
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
    EXPECT_LT(relative_rms(all_logits(model, *backend_, tokens, 1), sparse), 0.01);
  }
}

TEST_F(Sparsify, CatsAndRsparseRefuse) {
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
      refused("cats", 0.3, [](SparsifyOptions& o) { o.types.weights = DType::int8; }).find("--weights int8"),
      std::string::npos);
  EXPECT_NE(
      refused("cats", 0.3, [](SparsifyOptions& o) { o.choice.allocation = Allocation::greedy; }).find("cats"),
      std::string::npos);
  EXPECT_NE(
      refused("rsparse", 0.3, [](SparsifyOptions& o) { o.types.weights = DType::int4; }).find("low rank"),
      std::string::npos);
  EXPECT_NE(refused("rsparse", 0.3, [](SparsifyOptions& o) { o.choice.mix = 1.5; }).find("--mix 1.5"),
            std::string::npos);
}

/// Models that are trained to be sparse: what their own plan skips changes no bit, neither as they came nor
/// stored by channels (and `up` by outputs), where it is not read.
TEST_F(Sparsify, TrainedSparseEqualsDenseBitForBit) {
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
    EXPECT_EQ(lines.layers[0].weights[Projection::up].layout, Layout::channels);
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

/// `up` by outputs goes through rounding by moments as well.
TEST_F(Sparsify, TrainedSparseIsRoundedByMoments) {
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

constexpr DType kLineTypes[] = {DType::int8, DType::int4};

SparsifyOptions quantised_to(DType t, double sparsity) {
  SparsifyOptions options;
  options.choice.sparsity = sparsity;
  options.types = {t, companion(t), companion(t), companion(t)};
  return options;
}

TEST_F(Sparsify, QuantisedKeepAllEqualsDenseBitForBit) {  // law 1
  for (const DType t : kLineTypes) {
    TemporaryDir dir;
    make(demo_model(), dir / "out", quantised_to(t, 0));
    const Model model = load_model(dir / "out");
    const auto tokens = some_tokens(model.config.vocab, 12);
    EXPECT_EQ(all_logits(model, *backend_, tokens, 1), all_logits(model, *backend_, tokens, 1, true));
    EXPECT_EQ(all_logits(model, *backend_, tokens, 12), all_logits(model, *backend_, tokens, 12, true));
  }
}

TEST_F(Sparsify, QuantisedSparseEqualsMasked) {  // law 2, on the weights of a file
  for (const DType t : kLineTypes) {
    TemporaryDir dir;
    make(demo_model(), dir / "out", quantised_to(t, 0.5));
    const Model model = load_model(dir / "out");
    const auto kept = backend_->make_selection(1, model.config.ffn);
    for (const Layer& layer : model.layers) {
      for (size_t g = 0; g < layer.plan.groups.size(); ++g) {
        const Group& group = layer.plan.groups[g];
        const Weight& w = layer.weights[group.projections[0]];
        std::vector<float> x(static_cast<size_t>(w.in)), masked(x.size()), sparse(static_cast<size_t>(w.out)),
            dense(sparse.size());
        for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i * i));
        const Mat row(x.data(), 1, w.in), expanded(masked.data(), 1, w.in);
        backend_->topk(row, layer.groups[g].scale, group.rule.keep, *kept);
        backend_->expand(*kept, expanded);
        const Product by_selection{w, Mat(sparse.data(), 1, w.out), false};
        const Product by_mask{w, Mat(dense.data(), 1, w.out), false};
        backend_->sparse_matmul(*kept, std::span(&by_selection, 1));
        backend_->matmul(expanded, std::span(&by_mask, 1));
        ASSERT_EQ(sparse, dense) << dtype_name(t);
      }
    }
  }
}

TEST_F(Sparsify, QuantisedTokenByTokenEqualsPrompt) {  // law 4
  for (const DType t : kLineTypes) {
    TemporaryDir dir;
    make(demo_model(), dir / "out", quantised_to(t, 0));
    const Model model = load_model(dir / "out");
    const auto tokens = some_tokens(model.config.vocab, 40);
    const auto prompt = all_logits(model, *backend_, tokens, tokens.size());
    // One row multiplies by numbers of 15 bits of a block's largest (docs/numerics.md): some 4e-5 of a
    // product's size, and 8 layers of 7 products. Several rows are float32 products either way.
    EXPECT_LT(relative_rms(all_logits(model, *backend_, tokens, 1), prompt), 1e-3);
    EXPECT_LT(relative_rms(all_logits(model, *backend_, tokens, 7), prompt), 2e-5);
  }
}

TEST_F(Sparsify, QuantisedFilesOfEveryFamilyAndForm) {
  for (const std::string& source : tiny_models()) {
    const Model original = load_model(source);
    const auto tokens = some_tokens(original.config.vocab, 24);
    const auto expected = all_logits(original, *backend_, tokens, tokens.size());
    for (const DType t : kLineTypes) {
      for (const char* method : {"dense", "larosa", "topk"}) {
        for (const Form form : {Form::folded, Form::simulate}) {
          TemporaryDir dir;
          SparsifyOptions options = quantised_to(t, 0);
          options.method = method;
          options.choice.form = form;
          make(source, dir / "out", options);
          const Model model = load_model(dir / "out");
          EXPECT_EQ(model.outer.head.layout, Layout::channels);
          EXPECT_EQ(model.outer.head.dtype, DType::int8);
          EXPECT_EQ(model.outer.embed.dtype, DType::int8);
          EXPECT_EQ(model.plan.notes.at("weights"), dtype_name(t));
          for (const Layer& layer : model.layers) {
            for (const Weight& w : layer.weights.projection) EXPECT_EQ(w.dtype, t);
            EXPECT_TRUE(!layer.adapter || layer.adapter.weight.dtype == DType::int8);
          }
          check_finite(model);
          EXPECT_EQ(model_bytes(model), model.checkpoint->bytes());
          const auto found = all_logits(model, *backend_, tokens, tokens.size());
          // Law 3's factor on tiny random models, about 8 (bf16: 2^-8 to 4e-2), times 6e-3 and 8e-2.
          EXPECT_LT(relative_rms(found, expected), t == DType::int8 ? 0.06 : 0.8)
              << source << " " << method << " " << dtype_name(t);
        }
      }
    }
  }
}

TEST_F(Sparsify, TypesOfEachClass) {
  TemporaryDir dir;
  SparsifyOptions options = with_sparsity(0.5);
  options.types = {DType::f16, DType::int4, DType::f32, DType::int4};
  make(demo_model(), dir / "out", options);
  const Model model = load_model(dir / "out");
  EXPECT_EQ(model.layers[0].weights[Projection::up].dtype, DType::f16);
  EXPECT_EQ(model.layers[0].adapter.weight.dtype, DType::int4);
  EXPECT_EQ(model.outer.head.dtype, DType::f32);
  EXPECT_EQ(model.outer.head.layout, Layout::rows);
  EXPECT_EQ(model.outer.embed.dtype, DType::int4);
  const TokenBytes bytes = token_bytes(model);
  EXPECT_EQ(bytes.adapters, 7 * (256 * line_bytes(DType::int4, 256) + kAdapterTop * 256 * 4));
  all_logits(model, *backend_, some_tokens(model.config.vocab, 4), 1);
  options.types.weights = DType::int4;
  options.output = "";
  make(demo_model(), dir / "lines", options);
  const Model lines = load_model(dir / "lines");
  const TokenBytes cost = token_bytes(lines);
  int64_t expected = 0;
  for (const Layer& layer : lines.layers) {
    for (const Group& group : layer.plan.groups) {
      for (const Projection p : group.projections)
        expected += group.rule.keep * line_bytes(DType::int4, layer.weights[p].out);
    }
  }
  EXPECT_EQ(cost.projections, expected);
}

TEST_F(Sparsify, RoundingByMomentsIsNearer) {
  TemporaryDir dir;
  SparsifyOptions options = quantised_to(DType::int4, 0);
  options.method = "dense";
  make(demo_model(), dir / "nearest", options);
  options.gptq = true;
  make(demo_model(), dir / "whole", options);
  const auto tokens = some_tokens(load_config(demo_model()).vocab, 8 * kWindow, 7);  // the calibration's own
  const std::vector<int32_t> window(tokens.begin(), tokens.begin() + kWindow);
  const auto expected = all_logits(load_model(demo_model()), *backend_, window, window.size());
  const auto distance = [&](const std::string& name) {
    const Model model = load_model(dir / name);
    EXPECT_FALSE(std::filesystem::exists(dir / (name + "/folded.tmp")));
    return relative_rms(all_logits(model, *backend_, window, window.size()), expected);
  };
  EXPECT_LT(distance("whole"), distance("nearest"));
  options.method = "larosa";
  options.choice.sparsity = 0.5;
  make(demo_model(), dir / "sparse", options);
  const Model sparse = load_model(dir / "sparse");
  EXPECT_EQ(sparse.plan.notes.at("rounding"), "gptq");
  EXPECT_EQ(all_logits(sparse, *backend_, window, 1).size(), window.size() * 4096);
}

/// What rounding sees of a folded model, layer by layer, is what the model itself computes.
TEST_F(Sparsify, CalibrationWalksAsTheDecoderDoes) {
  struct Seen : Observer {
    void see(Site, Mat entries, Mat) override {
      for (int64_t t = 0; t < entries.rows; ++t)
        values.insert(values.end(), entries.row(t), entries.row(t) + entries.cols);
    }
    std::vector<float> values;
  };
  for (const DType t : {DType::bf16, DType::int4}) {
    TemporaryDir dir;
    SparsifyOptions options = quantised_to(DType::int4, 0.5);
    if (t == DType::bf16) options = SparsifyOptions{};
    make(demo_model(), dir / "out", options);
    const Model model = load_model(dir / "out");
    ASSERT_TRUE(bool(model.layers[0].adapter));
    const ModelConfig& c = model.config;
    const auto tokens = some_tokens(c.vocab, kWindow, 7);
    Seen expected, found;
    Decoder decoder(c, *backend_);
    const auto cache = backend_->make_kv_cache({c.layers, c.kv_heads, c.head_dim, kWindow, DType::f32});
    std::vector<float> hidden(static_cast<size_t>(kWindow * c.dim));
    decoder.forward(model, tokens, *cache, 0, Pass{false, &expected}, Mat(hidden.data(), kWindow, c.dim));
    Calibration calibration(model.outer, c, *backend_, pool_, tokens, kWindow);
    for (int64_t l = 0; l < c.layers; ++l)
      calibration.walk(model.layers[static_cast<size_t>(l)], l, Pass{false, &found}, [] {});
    EXPECT_EQ(found.values, expected.values) << dtype_name(t);
  }
}

TEST_F(Sparsify, DamagedLinesAreRefused) {
  TemporaryDir dir;
  make(demo_model(), dir / "out", quantised_to(DType::int4, 0.5));
  const std::string layer = dir / "out/model-00003-of-00009.safetensors";
  const std::string outer = dir / "out/model-00001-of-00009.safetensors";
  const auto damage = [&](const std::string& file, const std::string& from, const std::string& to,
                          const std::vector<std::string>& words) {
    const std::string kept = file_bytes(file);
    std::string bytes = kept;
    const size_t place = bytes.find(from);
    ASSERT_NE(place, std::string::npos) << from;
    bytes.replace(place, from.size(), to);
    std::ofstream(file, std::ios::binary) << bytes;
    const std::string message = message_of([&] { load_model(dir / "out"); });
    EXPECT_FALSE(message.empty());
    EXPECT_EQ(message.find('\n'), std::string::npos);
    for (const std::string& word : words)
      EXPECT_NE(message.find(word), std::string::npos) << "\"" << message << "\" lacks " << word;
    std::ofstream(file, std::ios::binary) << kept;
  };
  // 704 inputs of 256 outputs: lines of 192 bytes as int4, of 320 as int8.
  damage(layer, R"("layers.1.down":{"dtype":"U8","shape":[704,192])",
         R"("layers.1.down":{"dtype":"U8","shape":[192,704])",
         {"model-00003-of-00009.safetensors", "layers.1.down", "(192, 704)", "(704, 320) (int8)",
          "(704, 192) (int4)"});
  damage(layer, R"("layers.1.down":{"dtype":"U8")", R"("layers.1.down":{"dtype":"I8")",
         {"model-00003-of-00009.safetensors", "layers.1.down", "dtype I8"});
  damage(layer, R"("layers.1.down")", R"("layers.1.dowm")", {"layers.1.down", "absent"});
  damage(outer, R"("head":{"dtype":"U8","shape":[256,)", R"("head":{"dtype":"I8","shape":[256,)",
         {"model-00001-of-00009.safetensors", "head", "I8"});
  damage(outer, R"("head":{"dtype")", R"("heat":{"dtype")", {"head", "absent"});

  // A scale that is no number is found where it is asked for.
  const Model model = load_model(dir / "out");
  const Weight& down = model.layers[1].weights[Projection::down];
  std::string bytes = file_bytes(layer);
  const Tensor tensor = *model.checkpoint->find_bytes("layers.1.down");
  const std::string line(reinterpret_cast<const char*>(down.line(5)), static_cast<size_t>(down.line_bytes()));
  EXPECT_EQ(tensor.data, static_cast<const std::byte*>(down.data));
  const size_t place = bytes.find(line);
  ASSERT_NE(place, std::string::npos);
  bytes.replace(place + static_cast<size_t>(scales_offset(DType::int4, 256)) + 6, 2, "\x00\x7e", 2);
  std::ofstream(layer, std::ios::binary) << bytes;
  const std::string message = message_of([&] { check_finite(load_model(dir / "out")); });
  for (const char* word : {"model-00003-of-00009.safetensors", "layers.1.down", "scale 3 of line 5", "nan"})
    EXPECT_NE(message.find(word), std::string::npos) << message;
}

TEST_F(Sparsify, WhatIsNotFiniteIsNotQuantised) {
  TemporaryDir dir;
  const std::string source = source_path("tests/golden/models/tinyllama-bf16");
  std::filesystem::copy(source, dir / "bad");
  std::string bytes = file_bytes(dir / "bad/model.safetensors");
  {
    const Checkpoint checkpoint = Checkpoint::open(dir / "bad");
    const Tensor up = *checkpoint.find("model.layers.1.mlp.up_proj.weight");
    const size_t place = bytes.find(std::string(reinterpret_cast<const char*>(up.data), 64));
    ASSERT_NE(place, std::string::npos);
    bytes.replace(place + 20, 2, "\xc0\x7f");
  }
  std::ofstream(dir / "bad/model.safetensors", std::ios::binary) << bytes;
  SparsifyOptions options = quantised_to(DType::int4, 0);
  options.method = "dense";
  EXPECT_NE(
      message_of([&] { make(dir / "bad", dir / "out", options); }).find("nan, which cannot be quantised"),
      std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(dir / "out"));
}

TEST_F(Sparsify, TokenByTokenEqualsPrompt) {  // law 4; dense, since a near-tie may flip a selection
  TemporaryDir dir;
  make(demo_model(), dir / "out", with_sparsity(0));
  const Model model = load_model(dir / "out");
  const auto tokens = some_tokens(model.config.vocab, 40);
  const auto prompt = all_logits(model, *backend_, tokens, tokens.size());
  EXPECT_LT(relative_rms(all_logits(model, *backend_, tokens, 1), prompt), 1e-5);
  EXPECT_LT(relative_rms(all_logits(model, *backend_, tokens, 7), prompt), 1e-5);
}

TEST_F(Sparsify, ThreadsDoNotChangeABit) {  // law 5: the files, and what they compute
  TemporaryDir dir;
  make(demo_model(), dir / "one", with_sparsity(0.5), 1);
  make(demo_model(), dir / "three", with_sparsity(0.5), 3);
  for (const auto& entry : std::filesystem::directory_iterator(dir / "one")) {
    const std::string name = entry.path().filename().string();
    EXPECT_TRUE(file_bytes(dir / ("one/" + name)) == file_bytes(dir / ("three/" + name))) << name;
  }
  const Model model = load_model(dir / "one");
  const auto tokens = some_tokens(model.config.vocab, 10);
  std::set<std::vector<float>> by_token, by_prompt;
  for (const int threads : {1, 2, 4}) {
    ThreadPool pool(threads);
    const auto backend = make_cpu_backend({}, pool);
    by_token.insert(all_logits(model, *backend, tokens, 1));
    by_prompt.insert(all_logits(model, *backend, tokens, tokens.size()));
  }
  EXPECT_EQ(by_token.size(), 1u);
  EXPECT_EQ(by_prompt.size(), 1u);
}

TEST_F(Sparsify, ReachesItsBudget) {  // law 7
  for (const char* method : {"larosa", "topk"}) {
    for (const double sparsity : {0.25, 0.5, 0.75}) {
      TemporaryDir dir;
      SparsifyOptions options = with_sparsity(sparsity);
      options.method = method;
      options.choice.site_scale = {0.8, 1.2, 0.8, 1.2};
      make(demo_model(), dir / "out", options);
      const Model model = load_model(dir / "out");
      EXPECT_NEAR(weight_sparsity(model.plan, plan_shape(model.config)), sparsity, 0.01);
      const TokenBytes bytes = token_bytes(model);
      EXPECT_NEAR(1.0 - static_cast<double>(bytes.projections) / static_cast<double>(bytes.projections_dense),
                  sparsity, 0.01);
    }
  }
}

SparsifyOptions teal(double sparsity, Allocation allocation = Allocation::uniform) {
  SparsifyOptions options;
  options.method = "teal";
  options.choice.sparsity = sparsity;
  options.choice.allocation = allocation;
  return options;
}

TEST_F(Sparsify, ThresholdsReachTheirBudgetOnOtherText) {  // law 7
  const auto reached = [&](const std::string& source, const SparsifyOptions& options) {
    TemporaryDir dir;
    make(source, dir / "out", options);
    const Model model = load_model(dir / "out");
    EXPECT_NEAR(weight_sparsity(model.plan, plan_shape(model.config)), options.choice.sparsity, 0.005);
    PerplexityOptions scoring;
    scoring.context = kWindow;
    const auto result =
        perplexity(model, nullptr, *backend_, pool_, some_tokens(model.config.vocab, 16 * kWindow, 11),
                   scoring, [](const PerplexityResult&, int64_t) {});
    return result.reached.value();
  };
  for (const double sparsity : {0.25, 0.75})
    EXPECT_NEAR(reached(demo_model(), teal(sparsity)), sparsity, 0.01);
  const std::string tiny = tiny_models().front();
  EXPECT_NEAR(reached(tiny, teal(0.4, Allocation::greedy)), 0.4, 0.01);
}

TEST_F(Sparsify, ThresholdsThatDropNothingEqualDense) {  // law 1
  TemporaryDir dir;
  make(demo_model(), dir / "out", teal(0));
  const Model model = load_model(dir / "out");
  EXPECT_EQ(model.plan.layers[0].groups.size(), 7u);
  const auto tokens = some_tokens(model.config.vocab, 12);
  EXPECT_EQ(all_logits(model, *backend_, tokens, 12), all_logits(model, *backend_, tokens, 12, true));
}

TEST_F(Sparsify, AdaptersCountInTheBudget) {
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

TEST_F(Sparsify, AllocationsReachTheBudget) {  // law 7
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

TEST_F(Sparsify, WithoutACurrencyEveryLayerMeetsTheBudget) {
  TemporaryDir dir;
  SparsifyOptions options = with_sparsity(0.5);
  options.choice.allocation = Allocation::lagrangian;
  options.choice.currency = Currency::none;
  make(source_path("tests/golden/models/llama3.1-f32"), dir / "out", options);
  const Model model = load_model(dir / "out");
  for (const LayerPlan& layer : model.plan.layers)
    EXPECT_NEAR(weight_sparsity(layer, plan_shape(model.config)), 0.5, 0.01);
}

/// A trial tells a layer's plans apart as the layer itself does.
TEST_F(Sparsify, TrialsMeasureTheLayersOutput) {
  TemporaryDir dir;
  make(demo_model(), dir / "out", with_sparsity(0.5));
  Model model = load_model(dir / "out");
  const auto tokens = some_tokens(model.config.vocab, 4 * kWindow, 3);
  Calibration calibration(model.outer, model.config, *backend_, pool_, tokens, kWindow);
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
      const Mat x(rows->data(), kWindow, model.config.dim);
      const auto cache =
          backend_->make_kv_cache({1, model.config.kv_heads, model.config.head_dim, kWindow, DType::f32});
      decoder.embed(model.outer, std::span(tokens).subspan(w * kWindow, kWindow), x);
      decoder.layer(model.layers[0], 0, *cache, 0, 0, x, Pass{rows == &dense, nullptr});
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

TEST_F(Sparsify, FullDiskLeavesNothingAndResumes) {
  TemporaryDir dir;
  make(demo_model(), dir / "whole", with_sparsity(0.5));
  const pid_t child = fork();
  if (child == 0) {
    // A file size limit stands for the full disk: the embedding's file is the only one above it.
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{2u << 20, 2u << 20};
    setrlimit(RLIMIT_FSIZE, &limit);
    try {
      make(demo_model(), dir / "out", with_sparsity(0.5), 1);
    } catch (const Error& e) {
      _exit(std::string(e.what()).find("out.partial") != std::string::npos ? 3 : 4);
    }
    _exit(5);
  }
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 3);
  EXPECT_FALSE(std::filesystem::exists(dir / "out"));
  EXPECT_TRUE(std::filesystem::exists(dir / "out.partial"));
  EXPECT_THROW(make(demo_model(), dir / "out", with_sparsity(0.4)), Error);  // other options: not mixed
  make(demo_model(), dir / "out", with_sparsity(0.5));
  EXPECT_FALSE(std::filesystem::exists(dir / "out.partial"));
  for (const auto& entry : std::filesystem::directory_iterator(dir / "whole")) {
    const std::string name = entry.path().filename().string();
    EXPECT_TRUE(file_bytes(dir / ("whole/" + name)) == file_bytes(dir / ("out/" + name))) << name;
  }
}

TEST_F(Sparsify, ResumesBetweenTwoPlans) {
  TemporaryDir dir;
  make(demo_model(), dir / "whole", teal(0.5));
  const std::string partial = dir / "out.partial";
  const pid_t child = fork();
  if (child == 0) {
    catch_interrupts();
    std::thread([&] {
      while (!std::filesystem::exists(partial + "/plan-2.json"))
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      kill(getpid(), SIGINT);
    }).detach();
    try {
      make(demo_model(), dir / "out", teal(0.5), 1);
    } catch (const Interrupted&) {
      _exit(3);
    }
    _exit(5);
  }
  int status = 0;
  waitpid(child, &status, 0);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 3);
  EXPECT_FALSE(std::filesystem::exists(dir / "out"));
  EXPECT_TRUE(std::filesystem::exists(partial + "/plan-2.json"));
  EXPECT_FALSE(std::filesystem::exists(partial + "/plan-7.json"));
  make(demo_model(), dir / "out", teal(0.5));
  EXPECT_FALSE(std::filesystem::exists(partial));
  for (const auto& entry : std::filesystem::directory_iterator(dir / "whole")) {
    const std::string name = entry.path().filename().string();
    EXPECT_TRUE(file_bytes(dir / ("whole/" + name)) == file_bytes(dir / ("out/" + name))) << name;
  }
}

TEST_F(Sparsify, RefusesBadInput) {
  TemporaryDir dir;
  std::filesystem::create_directory(dir / "there");
  EXPECT_NE(message_of([&] { make(demo_model(), dir / "there", with_sparsity(0.5)); }).find("exists"),
            std::string::npos);
  for (const double sparsity : {-0.1, 0.96, 2.0, std::nan("")}) {
    EXPECT_NE(
        message_of([&] { make(demo_model(), dir / "out", with_sparsity(sparsity)); }).find("--sparsity"),
        std::string::npos);
  }
  SparsifyOptions unknown = with_sparsity(0.5);
  unknown.method = "magic";
  EXPECT_NE(message_of([&] {
              make(demo_model(), dir / "out", unknown);
            }).find("larosa, topk, teal, wina, cats, rsparse, dense"),
            std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(dir / "out"));
  EXPECT_FALSE(std::filesystem::exists(dir / "out.partial"));
  const std::vector<int32_t> few = {1, 2, 3};
  EXPECT_NE(message_of([&] { calibration_windows(few, 8, 1, "text.txt"); }).find("text.txt: 3 tokens"),
            std::string::npos);
  make(demo_model(), dir / "out", with_sparsity(0.5));
  EXPECT_NE(message_of([&] { make(dir / "out", dir / "again", with_sparsity(0.5)); }).find("field larosa"),
            std::string::npos);
}

TEST_F(Sparsify, RefusesAPlanOfAnotherModel) {
  TemporaryDir dir;
  make(demo_model(), dir / "out", with_sparsity(0.5));
  const std::string file = dir / "out/model-00001-of-00009.safetensors";
  std::string bytes = file_bytes(file);
  const std::string fingerprint = load_model(dir / "out").plan.fingerprint;
  const size_t place = bytes.find("fingerprint\\\":\\\"" + fingerprint);
  ASSERT_NE(place, std::string::npos);
  char& digit = bytes[place + 16];
  digit = digit == '0' ? '1' : '0';
  std::ofstream(file, std::ios::binary) << bytes;
  EXPECT_NE(message_of([&] { load_model(dir / "out"); }).find("another model"), std::string::npos);
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
