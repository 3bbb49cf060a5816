// Sharing out a budget: what the greedy walk does where the best answer is known.
#include "calib/allocate.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "model_fixture.h"

namespace larosa {
namespace {

double share_of(const ModelConfig& config, const Levels& levels) {
  double dropped = 0;
  for (const Projection p : kProjections)
    dropped += levels[static_cast<size_t>(p)] * static_cast<double>(projection_in(config, p)) *
               static_cast<double>(projection_out(config, p));
  return dropped / static_cast<double>(layer_weights(config));
}

TEST(Greedy, FindsTheMinimumOfAConvexSum) {
  // Σ a_g s_g² at Σ w_g s_g = S is least at s_g = S (w_g / a_g) / Σ (w² / a).
  const ModelConfig config = load_config(demo_model());
  const LayerPlan outline = dense_layer();  // q k v | o | gate up | down
  const double weight[] = {2, 1, 5.5, 2.75}, cost[] = {1, 0.5, 4, 1};
  int calls = 0;
  const auto error = [&](const Levels& levels) {
    ++calls;
    double sum = 0;
    for (size_t g = 0; g < outline.groups.size(); ++g)
      sum += cost[g] * std::pow(levels[static_cast<size_t>(outline.groups[g].projections[0])], 2);
    return sum;
  };
  const Levels levels = greedy_levels(config, outline, 0.4, error);
  EXPECT_NEAR(share_of(config, levels), 0.4, 1e-9);
  double scale = 0;
  for (size_t g = 0; g < 4; ++g) scale += weight[g] * weight[g] / cost[g] / 11.25;
  for (size_t g = 0; g < 4; ++g) {
    const double step = 0.005 * 11.25 / weight[g];
    for (const Projection p : outline.groups[g].projections)
      EXPECT_NEAR(levels[static_cast<size_t>(p)], 0.4 * weight[g] / cost[g] / scale, step) << g;
  }
  EXPECT_LT(calls, 2.5 * 80);  // 80 steps, four groups: stale costs are not asked for again
}

TEST(Greedy, StopsAtTheLargestLevel) {
  const ModelConfig config = load_config(demo_model());
  const auto cheap_down = [](const Levels& levels) { return levels[0] + levels[3] + levels[4]; };
  const Levels levels = greedy_levels(config, dense_layer(), 0.5, cheap_down);
  EXPECT_DOUBLE_EQ(levels[static_cast<size_t>(Projection::down)], kMostSparse);
  EXPECT_NEAR(share_of(config, levels), 0.5, 1e-9);
  const Levels all = greedy_levels(config, dense_layer(), kMostSparse, cheap_down);
  for (const double level : all) EXPECT_NEAR(level, kMostSparse, 1e-6);
  EXPECT_THROW(greedy_levels(config, dense_layer(), 0.96, cheap_down), Error);
}

Curve curve_of(double weight, const std::function<double(double)>& error) {
  Curve curve{weight, {}};
  for (const double level : kCurveLevels) curve.errors.push_back(error(level));
  return curve;
}

double dropped_by(const std::vector<Curve>& curves, const std::vector<double>& levels) {
  double sum = 0, total = 0;
  for (size_t i = 0; i < curves.size(); ++i) {
    sum += curves[i].weight * levels[i];
    total += curves[i].weight;
  }
  return sum / total;
}

TEST(Lagrangian, FindsTheMinimumOfQuadraticCurves) {
  // As Greedy above; the slope of a parabola is linear, so the measured points are all that is needed.
  const double weight[] = {2, 1, 5, 3}, cost[] = {1, 0.5, 4, 1};
  std::vector<Curve> curves;
  for (size_t g = 0; g < 4; ++g)
    curves.push_back(curve_of(weight[g], [&](double level) { return cost[g] * level * level; }));
  for (const double sparsity : {0.05, 0.3, 0.5}) {
    const std::vector<double> levels = lagrangian_levels(curves, sparsity);
    EXPECT_NEAR(dropped_by(curves, levels), sparsity, 1e-9);
    double scale = 0;
    for (size_t g = 0; g < 4; ++g) scale += weight[g] * weight[g] / cost[g] / 11;
    for (size_t g = 0; g < 4; ++g) EXPECT_NEAR(levels[g], sparsity * weight[g] / cost[g] / scale, 1e-6) << g;
  }
}

TEST(Lagrangian, BudgetAndBoundsWhateverTheCurves) {
  const auto bumpy = [](double level) { return level < 0.5 ? 3 * level : 1.6 + 0.1 * std::sin(40 * level); };
  const auto falling = [](double level) { return -level; };
  const auto none = [](double) { return 0.0; };
  const auto steep = [](double level) { return std::exp(8 * level); };
  const std::vector<Curve> curves = {curve_of(1, bumpy), curve_of(2, steep), curve_of(1, none),
                                     curve_of(3, steep), curve_of(0.5, falling)};
  for (const double sparsity : {0.0, 0.3, 0.5, 0.8, kMostSparse}) {
    const std::vector<double> levels = lagrangian_levels(curves, sparsity);
    for (const double level : levels) {
      EXPECT_GE(level, 0);
      EXPECT_LE(level, kMostSparse);
    }
    // What costs nothing is dropped at any price, so small budgets cannot be met from below.
    if (sparsity >= 0.3) {
      EXPECT_NEAR(dropped_by(curves, levels), sparsity, 1e-6) << sparsity;
    }
  }
  EXPECT_EQ(lagrangian_levels(curves, 0), std::vector<double>(5, 0));
  EXPECT_THROW(lagrangian_levels(curves, 0.96), Error);
}

TEST(SiteScale, FindsTheMinimumOfTheSumsOverLayers) {
  // Σ a s² at Σ w s = S is least at s = S (w / a) / Σ (w² / a), a and w summed per site; h3 has two groups.
  using enum Projection;
  LayerPlan layer;
  layer.groups = {{{wq, wk, wv}, {}}, {{wo}, {}}, {{gate}, {}}, {{up}, {}}, {{down}, {}}};
  const double weight[] = {2, 1, 2, 3, 3}, cost[2][5] = {{1, 0.1, 1, 2, 0.5}, {0.5, 0.4, 0.5, 0.5, 0.5}};
  const double weights[] = {4, 2, 10, 6}, costs[] = {1.5, 0.5, 4, 1};
  std::vector<Curve> curves;
  for (const auto& of_layer : cost) {
    for (size_t g = 0; g < 5; ++g)
      curves.push_back(curve_of(weight[g], [&](double level) { return of_layer[g] * level * level; }));
  }
  const std::vector<LayerPlan> layers = {layer, layer};
  const auto found = search_site_scale(layers, curves, 0.4, 0),
             half = search_site_scale(layers, curves, 0.4, 0.5);
  double scale = 0;
  for (size_t i = 0; i < 4; ++i) scale += weights[i] * weights[i] / costs[i] / 22;
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(found[i], weights[i] / costs[i] / scale, 0.0006) << i;
    EXPECT_EQ(found[i], std::round(1000 * found[i]) / 1000);
    EXPECT_NEAR(half[i], 0.5 + found[i] / 2, 0.0011) << i;
  }
  EXPECT_EQ(search_site_scale(layers, curves, 0.4, 1), Choice{}.site_scale);
  EXPECT_EQ(search_site_scale(layers, curves, 0, 0), Choice{}.site_scale);
}

TEST(Magnitudes, QuantilesOfWhatWasSeen) {
  std::vector<float> x;
  for (int i = 1; i <= 1000; ++i) x.push_back((i % 2 ? 1.0f : -1.0f) * static_cast<float>(i));
  Magnitudes seen;
  seen.add(Mat(x.data(), 10, 100));
  EXPECT_EQ(seen.quantile(0), 0);
  EXPECT_EQ(seen.share_above(0), 1);
  for (const double level : {0.1, 0.5, 0.9}) {
    const float cut = seen.quantile(level);
    EXPECT_NEAR(cut, 1000 * level, 1);  // a bin is 1/2048 of an octave
    EXPECT_NEAR(seen.share_above(cut), 1 - level, 1e-9);
    const int64_t kept = std::count_if(x.begin(), x.end(), [&](float v) { return std::abs(v) > cut; });
    EXPECT_EQ(kept, std::llround(1000 * (1 - level)));
  }
  x[3] = std::nanf("");
  Magnitudes bad;
  bad.add(Mat(x.data(), 1, 10));
  EXPECT_THROW(bad.quantile(1), Error);
}

}  // namespace
}  // namespace larosa
