// Words of a plan that ask for lines other than a channel's, at 8 and 4 bits: neurons left out of `up`, which
// stands by outputs, and products of low rank, whose lines are ranks.
#include <algorithm>
#include <set>

#include "base/quant.h"
#include "sparsify_fixture.h"

namespace larosa {
namespace {

constexpr DType kLineTypes[] = {DType::int8, DType::int4};

class Lines : public Sparsify {
 protected:
  static SparsifyOptions lines(const char* method, DType t, double sparsity) {
    SparsifyOptions options = with_sparsity(sparsity);
    options.method = method;
    options.choice.mix = 0.6;
    options.types = {t, DType::int8, DType::int8, DType::int8};
    return options;
  }
  /// Of random numbers: an odd number of neurons, and biases.
  static std::string tiny() { return source_path("tests/golden/models/llama-biases-f16"); }
};

/// Largest |w − stored| over half the scale that stands beside it, of a weight of the same numbers as
/// `source`.
double worst_miss(const Weight& stored, const Weight& source) {
  const std::vector<float> values = read_weight(stored);
  double worst = 0;
  for (int64_t i = 0; i < source.in; ++i) {
    for (int64_t j = 0; j < source.out; ++j) {
      const bool rows = stored.layout == Layout::rows;
      const int64_t line = rows ? j : i, at = rows ? i : j, length = stored.line_length();
      const double value = load_element(source.data, source.dtype, j * source.in + i);
      const double scale = std::fabs(read_scale(stored.line(line), stored.dtype, length, at));
      worst = std::max(worst, std::fabs(values[static_cast<size_t>(line * length + at)] - value) / scale * 2);
    }
  }
  return worst;
}

TEST_F(Lines, OfUpAreOutputs) {
  const Model original = load_model(tiny());
  const ModelConfig& c = original.config;
  for (const DType t : kLineTypes) {
    TemporaryDir dir;
    make(tiny(), dir / "out", lines("cats", t, 0.3));
    const Model model = load_model(dir / "out");
    int64_t expected = 0, whole = 0;
    for (size_t l = 0; l < model.layers.size(); ++l) {
      const LayerWeights& w = model.layers[l].weights;
      const int64_t keep = model.layers[l].plan.neurons.keep;
      ASSERT_GT(keep, 0);
      ASSERT_LT(keep, c.ffn);
      for (const Projection p : kProjections) {
        EXPECT_EQ(w[p].dtype, t);
        EXPECT_EQ(w[p].layout, p == Projection::up ? Layout::rows : Layout::channels);
        // Levels below the least one's half are the clamped tails of 4 bits.
        EXPECT_LE(worst_miss(w[p], original.layers[l].weights[p]), t == DType::int8 ? 1.02 : 3.1);
        whole += w[p].bytes();
        if (p != Projection::up && p != Projection::down) expected += w[p].bytes();
      }
      expected += keep * (line_bytes(t, c.dim) + line_bytes(t, c.dim));  // a row of up, a channel of down
    }
    const TokenBytes bytes = token_bytes(model);
    EXPECT_EQ(bytes.projections, expected);
    EXPECT_EQ(bytes.projections_dense, whole);
    EXPECT_EQ(model_bytes(model), model.checkpoint->bytes());
  }
}

TEST_F(Lines, OfLowRanksAreRanks) {
  for (const DType t : kLineTypes) {
    for (const bool gptq : {false, true}) {
      TemporaryDir dir;
      SparsifyOptions options = lines("rsparse", t, 0.2);
      make(tiny(), dir / "wide", options);  // types of the weights; the source's beside them
      options.types.weights.reset();
      make(tiny(), dir / "source", options);
      options.types.weights = t;
      options.gptq = gptq;
      make(tiny(), dir / "out", options);
      const Model model = load_model(dir / "out"), source = load_model(dir / "source");
      int64_t expected = 0;
      std::set<int64_t> ranks;
      for (size_t l = 0; l < model.layers.size(); ++l) {
        for (size_t g = 0; g < model.layers[l].groups.size(); ++g) {
          const Group& group = model.layers[l].plan.groups[g];
          ranks.insert(group.rank);
          if (group.rank == 0) continue;
          const LowRank& low = model.layers[l].groups[g].low.at(0);
          EXPECT_EQ(low.in.dtype, t);
          EXPECT_EQ(low.out.dtype, t);
          EXPECT_EQ(low.in.layout, Layout::rows);
          EXPECT_EQ(low.out.layout, Layout::channels);
          EXPECT_EQ(low.in.lines(), group.rank);
          EXPECT_EQ(low.out.lines(), group.rank);
          expected += group.rank * (line_bytes(t, low.in.in) + line_bytes(t, low.out.out));
          const LowRank& wide = source.layers[l].groups[g].low.at(0);
          ASSERT_EQ(wide.in.layout, Layout::channels);
          for (int64_t r = 0; r < group.rank; ++r) {
            std::vector<float> line(static_cast<size_t>(low.in.in));
            read_line(low.in.line(r), t, low.in.in, 0, low.in.in, line.data());
            for (int64_t i = 0; i < low.in.in; ++i) {
              const double value = load_element(wide.in.line(i), wide.in.dtype, r);
              const double step = std::fabs(read_scale(low.in.line(r), t, low.in.in, i));
              ASSERT_NEAR(line[static_cast<size_t>(i)], value, 1.6 * step + 1e-3 * std::fabs(value));
            }
          }
        }
      }
      EXPECT_GT(*ranks.rbegin(), 1);
      EXPECT_EQ(token_bytes(model).low_rank, expected);
      EXPECT_EQ(model_bytes(model), model.checkpoint->bytes());
    }
  }
}

/// All neurons kept are the whole product, bit for bit; token by token and at once, and on `ref`, the same
/// model.
TEST_F(Lines, ComputeWhatTheyStandFor) {
  const auto ref = make_ref_backend();
  for (const char* method : {"cats", "rsparse"}) {
    for (const DType t : kLineTypes) {
      SCOPED_TRACE(std::string(method) + " " + dtype_name(t));
      TemporaryDir dir;
      make(tiny(), dir / "out", lines(method, t, 0.25));
      Model model = load_model(dir / "out");
      const auto tokens = some_tokens(model.config.vocab, 16);
      const auto dense = all_logits(model, *backend_, tokens, tokens.size(), true);
      const auto sparse = all_logits(model, *backend_, tokens, 1);
      EXPECT_GT(relative_rms(sparse, dense), 0.005);
      // Rounding puts an entry to the other side of a cut in one text of six, where it does in any.
      std::vector<double> at_once, on_ref;
      for (uint64_t seed = 1; seed <= 6; ++seed) {
        const auto text = some_tokens(model.config.vocab, 16, seed);
        const auto steps = all_logits(model, *backend_, text, 1);
        const auto prompt = all_logits(model, *backend_, text, text.size());
        const auto exact = all_logits(model, *ref, text, 1);
        at_once.push_back(relative_rms(prompt, steps));
        on_ref.push_back(relative_rms(exact, steps));
        EXPECT_LT(relative_rms(prompt, exact), 1e-4);  // neither rounds what multiplies
      }
      for (std::vector<double>* off : {&at_once, &on_ref}) {
        std::sort(off->begin(), off->end());
        EXPECT_LT((*off)[3], 2e-4);
        EXPECT_LT(off->back(), 0.1);
      }
      for (Layer& layer : model.layers) {
        if (layer.plan.neurons.select != Select::all) layer.plan.neurons.cut = 0;
        for (Group& group : layer.plan.groups) group.rule.cut = 0;
      }
      for (const size_t chunk : {size_t{1}, size_t{7}, tokens.size()}) {
        const auto all = all_logits(model, *backend_, tokens, chunk),
                   expected = all_logits(model, *backend_, tokens, chunk, true);
        EXPECT_EQ(all, expected) << chunk;
      }
    }
  }
}

TEST_F(Lines, OfUpAreRoundedByMoments) {
  TemporaryDir dir;
  SparsifyOptions options = lines("cats", DType::int4, 0.2);
  make(demo_model(), dir / "nearest", options);
  options.gptq = true;
  make(demo_model(), dir / "moments", options);
  Model nearest = load_model(dir / "nearest");
  const Model moments = load_model(dir / "moments");
  const auto tokens = some_tokens(nearest.config.vocab, 8 * kWindow, 7);  // the calibration's own
  const std::vector<int32_t> window(tokens.begin(), tokens.begin() + kWindow);
  const auto expected = all_logits(load_model(demo_model()), *backend_, window, window.size());
  const auto distance = [&](const Model& model) {
    return relative_rms(all_logits(model, *backend_, window, window.size(), true), expected);
  };
  const double before = distance(nearest);
  EXPECT_LT(distance(moments), before);
  // `up` alone: nearer with its lines by moments in place of the nearest ones.
  for (size_t l = 0; l < nearest.layers.size(); ++l)
    nearest.layers[l].weights[Projection::up] = moments.layers[l].weights[Projection::up];
  EXPECT_LT(distance(nearest), before);
}

/// Lines of other lengths than the plan's words ask for: `up` by channels, as it stood before, and a product
/// by its other side.
TEST_F(Lines, OtherLinesAreRefused) {
  TemporaryDir dir;
  make(demo_model(), dir / "cats", lines("cats", DType::int8, 0.2));
  make(demo_model(), dir / "rsparse", lines("rsparse", DType::int4, 0.2));
  const auto damaged = [&](const std::string& name, const std::string& from, const std::string& to) {
    const std::string file = dir / (name + "/model-00002-of-00009.safetensors"), kept = file_bytes(file);
    std::string bytes = kept;
    const size_t place = bytes.find(from);
    EXPECT_NE(place, std::string::npos) << from;
    bytes.replace(place, from.size(), to);
    std::ofstream(file, std::ios::binary) << bytes;
    const std::string message = message_of([&] { load_model(dir / name); });
    std::ofstream(file, std::ios::binary) << kept;
    for (const char* word : {"model-00002-of-00009.safetensors", "expected"})
      EXPECT_NE(message.find(word), std::string::npos) << message;
    return message;
  };
  const std::string up = damaged("cats", R"("layers.0.up":{"dtype":"U8","shape":[704,320])",
                                 R"("layers.0.up":{"dtype":"U8","shape":[256,880])");
  EXPECT_NE(
      up.find("layers.0.up: shape of U8 is (256, 880), expected (704, 320) (int8) or (704, 192) (int4)"),
      std::string::npos)
      << up;
  const auto rank = std::to_string(load_model(dir / "rsparse").layers[0].plan.groups[0].rank);
  const std::string header = R"("layers.0.wq.low_in":{"dtype":"U8","shape":[)";
  const std::string low = damaged("rsparse", header + rank + ",192]", header + "192," + rank + "]");
  EXPECT_NE(low.find("layers.0.wq.low_in: shape of U8 is (192, " + rank + "), expected (" + rank +
                     ", 320) (int8) or (" + rank + ", 192) (int4)"),
            std::string::npos)
      << low;
}

}  // namespace
}  // namespace larosa
