// sparsify as a whole: the laws that hold between a model and what is made from it, interruption, bad input.
#include "sparsify_fixture.h"

#include <sys/resource.h>
#include <sys/wait.h>

#include <chrono>
#include <csignal>
#include <set>
#include <thread>

#include "base/error.h"
#include "base/progress.h"
#include "base/quant.h"
#include "calib/sparsify.h"
#include "calib/statistics.h"
#include "eval/perplexity.h"

namespace larosa {
namespace {

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
          EXPECT_EQ(model.outer.head.layout, Layout::rows);
          EXPECT_EQ(model.outer.head.dtype, DType::int8);
          const bool rewritten = method == std::string("larosa") && form == Form::folded;
          const bool tied = original.outer.head.data == original.outer.embed.data && !rewritten;
          EXPECT_EQ(model.outer.head.data == model.outer.embed.data, tied);
          EXPECT_EQ(model.config.tied, tied);  // so a head that is missing is missed
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
    const auto algebra = backend_->make_algebra(pool_);
    Calibration calibration(model.outer, c, *backend_, *algebra, tokens, kWindow);
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
  damage(outer, R"("head":{"dtype":"U8","shape":[4096,)", R"("head":{"dtype":"I8","shape":[4096,)",
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

/// -1: it did not end by itself.
int exit_code(pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
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
  EXPECT_EQ(exit_code(child), 3);
  EXPECT_FALSE(std::filesystem::exists(dir / "out"));
  EXPECT_TRUE(std::filesystem::exists(dir / "out.partial"));
  EXPECT_THROW(make(demo_model(), dir / "out", with_sparsity(0.4)), Error);  // other options: not mixed
  make(demo_model(), dir / "out", with_sparsity(0.5));
  EXPECT_FALSE(std::filesystem::exists(dir / "out.partial"));
  expect_same_files(dir / "whole", dir / "out");
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
  EXPECT_EQ(exit_code(child), 3);
  EXPECT_FALSE(std::filesystem::exists(dir / "out"));
  EXPECT_TRUE(std::filesystem::exists(partial + "/plan-2.json"));
  EXPECT_FALSE(std::filesystem::exists(partial + "/plan-7.json"));
  const std::string plan = file_bytes(partial + "/plan-0.json");
  for (const auto& [from, to] :
       {std::pair{"\"keep\":", "\"rank\":8,\"keep\":"}, std::pair{"\"threshold\"", "\"topk\""},
        std::pair{"\"cut\":", "\"cut\":-"}}) {
    std::string other = plan;
    ASSERT_NE(other.find(from), std::string::npos);
    other.replace(other.find(from), std::string(from).size(), to);
    std::ofstream(partial + "/plan-0.json") << other;
    const std::string message = message_of([&] { make(demo_model(), dir / "out", teal(0.5)); });
    EXPECT_NE(message.find("plan-0.json: "), std::string::npos) << message;
  }
  std::ofstream(partial + "/plan-0.json") << plan;
  make(demo_model(), dir / "out", teal(0.5));
  EXPECT_FALSE(std::filesystem::exists(partial));
  expect_same_files(dir / "whole", dir / "out");
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

}  // namespace
}  // namespace larosa
