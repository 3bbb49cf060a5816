// sparsify as a whole: the laws that hold between a model and what is made from it, interruption, bad input.
#include "calib/sparsify.h"

#include <sys/resource.h>
#include <sys/wait.h>

#include <csignal>
#include <set>

#include "base/error.h"
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
  EXPECT_NE(message_of([&] { make(demo_model(), dir / "out", unknown); }).find("larosa, topk, dense"),
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

TEST(SiteKeeps, UsesTheWholeBudget) {
  const ModelConfig config = load_config(demo_model());
  const auto uniform = site_keeps(config, 0.5, {1, 1, 1, 1});
  EXPECT_EQ(uniform, (std::array<int64_t, 4>{128, 128, 128, 352}));
  const auto capped = site_keeps(config, 0.9, {1, 100, 1, 1});
  EXPECT_EQ(capped[1], std::llround(256 * 0.05));
  EXPECT_THROW(site_keeps(config, 0.9, {1, 0, 0, 0}), Error);
}

}  // namespace
}  // namespace larosa
