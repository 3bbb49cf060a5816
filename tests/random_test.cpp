// Random models: the right shapes, equal for equal seeds, finite through many layers.
#include "model/random.h"

#include "base/error.h"
#include "base/quant.h"
#include "calib/methods.h"
#include "io/json.h"
#include "model_fixture.h"
#include "text/tokenizer.h"

namespace larosa {
namespace {

Plan plan_for(const ModelConfig& config, double sparsity) {
  Choice choice;
  choice.sparsity = sparsity;
  return plan_model(find_method("larosa"), config, choice);
}

TEST(RandomModel, FiniteEqualAndSparse) {
  constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16, DType::int8, DType::int4};
  for (size_t m = 0; m < tiny_models().size(); ++m) {
    const std::string dir = tiny_models()[m];
    ModelConfig config = load_config(dir);
    config.layers = 40;
    for (const DType dtype : {kTypes[m % std::size(kTypes)]}) {
      std::vector<std::vector<float>> found;
      for (const int threads : {1, 2}) {
        ThreadPool pool(threads);
        const auto backend = make_cpu_backend({}, pool);
        const Model model = make_random_model(config, plan_for(config, 0.5), {dtype, 3}, pool);
        found.push_back(all_logits(model, *backend, some_tokens(config.vocab, 3), 1));
        const TokenBytes bytes = token_bytes(model);
        EXPECT_NEAR(static_cast<double>(bytes.projections) / static_cast<double>(bytes.projections_dense),
                    0.5, 0.02);
        EXPECT_EQ(bytes.adapters, 39 * (config.dim * line_bytes(companion(dtype), config.dim) +
                                        (quantised(dtype) ? kAdapterTop * config.dim * 4 : 0)));
      }
      EXPECT_EQ(found[0], found[1]);
      double squares = 0;
      for (float v : found[0]) squares += double{v} * double{v};
      EXPECT_TRUE(std::isfinite(squares) && squares > 0) << dir << " " << dtype_name(dtype);
    }
  }
}

TEST(RandomModel, TypesOfEachClass) {
  ThreadPool pool(2);
  ModelConfig config = load_config(demo_model());
  config.layers = 3;
  const auto make = [&](const RandomOptions& options) {
    return make_random_model(config, plan_for(config, 0.5), options, pool);
  };
  const Model quiet = make({DType::int4});
  EXPECT_EQ(quiet.layers[1].weights[Projection::gate].dtype, DType::int4);
  EXPECT_EQ(quiet.layers[1].adapter.weight.dtype, DType::int8);
  EXPECT_EQ(quiet.outer.head.dtype, DType::int8);
  EXPECT_EQ(quiet.outer.head.layout, Layout::rows);
  EXPECT_EQ(quiet.outer.embed.layout, Layout::rows);
  const Model chosen = make({DType::int8, 1, DType::bf16, DType::f16});
  EXPECT_EQ(chosen.layers[1].adapter.weight.dtype, DType::bf16);
  EXPECT_EQ(chosen.outer.head.dtype, DType::f16);
  EXPECT_EQ(chosen.outer.head.layout, Layout::rows);
  for (const Model* model : {&quiet, &chosen}) {
    for (const Weight& w : model->layers[2].weights.projection) {
      double squares = 0;
      const std::vector<float> values = read_weight(w);
      for (float v : values) squares += double{v} * double{v};
      const double size = squares / static_cast<double>(values.size()) * static_cast<double>(w.in);
      EXPECT_TRUE(size > 0.2 && size < 1.1) << size;  // of 1/in, the mean square that keeps a vector's size
    }
  }
}

TEST(RandomModel, TokensReadNoMoreThanTheWindow) {
  ThreadPool pool(1);
  ModelConfig config = load_config(demo_model());
  config.layers = 3, config.window = 10, config.window_from = 1;
  const Model model = make_random_model(config, plan_for(config, 0.5), {}, pool);
  const TokenBytes bytes = token_bytes(model, DType::f16);
  const int64_t position = 2 * config.kv_dim() * 2;
  EXPECT_EQ(bytes.kv(4), 4 * 3 * position);
  EXPECT_EQ(bytes.kv(100), (100 + 2 * 10) * position);
  EXPECT_EQ(bytes.sparse(100) - bytes.sparse(), bytes.kv(100));
  EXPECT_EQ(token_bytes(model, DType::int8).kv(4),
            4 * 3 * 2 * (config.kv_dim() + 4 * config.kv_heads));  // a scale for each head's key and value
}

TEST(RandomModel, RefusesAPlanOfAnotherShape) {
  ThreadPool pool(1);
  const ModelConfig config = load_config(demo_model());
  Plan plan = plan_for(config, 0.5);
  plan.layers.pop_back();
  EXPECT_THROW(make_random_model(config, plan, {}, pool), Error);
}

TEST(RandomCheckpoint, LoadsAsAModelOfEveryFamily) {
  ThreadPool pool(2);
  const auto backend = make_cpu_backend({}, pool);
  for (const std::string& source : tiny_models()) {
    TemporaryDir dir;
    nlohmann::json json = read_json(source + "/config.json");
    json["vocab_size"] = 300;
    std::ofstream(dir / "config.json") << json;
    int64_t last = 0, total = 0;
    write_random_checkpoint(dir / "config.json", dir / "out", {DType::f16}, 20000, pool,
                            [&](int64_t done, int64_t all) {
                              EXPECT_GT(done, last);
                              last = done, total = all;
                            });
    EXPECT_EQ(last, total);
    EXPECT_TRUE(std::filesystem::exists(dir / "out/model.safetensors.index.json"));
    const Model model = load_model(dir / "out");
    EXPECT_EQ(model_bytes(model), total);
    EXPECT_EQ(parameter_count(model.config) * 2, total) << source;
    model.checkpoint->check_finite();
    const Tokenizer tokenizer = Tokenizer::load(dir / "out");
    const std::string text = "Grüße, 世界\n\x01 \xf0\x9f\x99\x82";
    const auto ids = tokenizer.encode(text, true);
    EXPECT_EQ(ids.size(), text.size());
    EXPECT_EQ(tokenizer.decode(ids, true), text);
    all_logits(model, *backend, ids, ids.size());
    EXPECT_THROW(write_random_checkpoint(dir / "config.json", dir / "out", {}, 20000, pool, {}), Error);
  }
}

TEST(RandomCheckpoint, LeavesNothingHalfMade) {
  TemporaryDir dir;
  ThreadPool pool(1);
  struct Stopped {};
  const std::string config = demo_model() + "/config.json";
  const auto stop = [](int64_t, int64_t) { throw Stopped(); };
  EXPECT_THROW(write_random_checkpoint(config, dir / "out", {}, 1 << 20, pool, stop), Stopped);
  EXPECT_FALSE(std::filesystem::exists(dir / "out"));
  EXPECT_FALSE(std::filesystem::exists(dir / "out.partial"));
}

}  // namespace
}  // namespace larosa
