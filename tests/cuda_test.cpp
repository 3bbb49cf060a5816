// Every operation of the CUDA backend against `ref` on the shared case list, the laws, and whole models
// against the cpu backend. Label gpu; skipped where no device is.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "calib/sparsify.h"
#include "device.h"
#include "eval/perplexity.h"
#include "largest.h"
#include "larosa/engine.h"
#include "model_fixture.h"

namespace larosa {
namespace {

using namespace cases;

class Cuda : public testing::Test {
 protected:
  static void SetUpTestSuite() { shared() = find_cuda(); }
  static void TearDownTestSuite() { shared().reset(); }
  void SetUp() override {
    if (!shared()) GTEST_SKIP() << "no CUDA device: not tested";
  }
  static std::unique_ptr<Backend>& shared() {
    static std::unique_ptr<Backend> backend;
    return backend;
  }
  Backend& cuda() { return *shared(); }
  const std::unique_ptr<Backend> ref_ = make_ref_backend();
};

/// body(case, its operands on the device) for every shape, type, layout, aligned or not.
template <class Body>
void each_product(Backend& cuda, int64_t rows, bool extra, const Body& body) {
  std::vector<Shape> shapes = kShapes;
  shapes.push_back({4096, 1024});
  shapes.push_back({11008, 512});
  for (const Shape s : shapes) {
    for (const Layout layout : kLayouts) {
      for (const DType dtype : kTypes) {
        const ProductCase c(rows, s, dtype, layout, extra, extra);
        for (const bool aligned : {true, false}) {
          if (!aligned && quantised(dtype)) continue;
          SCOPED_TRACE(std::to_string(s.in) + "→" + std::to_string(s.out) + " " + dtype_name(dtype) +
                       (layout == Layout::rows ? " rows" : " channels") + (aligned ? "" : " unaligned"));
          DeviceCase device(cuda, c, aligned);
          body(c, device, s);
        }
      }
    }
  }
}

TEST_F(Cuda, GemvMatchesTruth) {
  for (const bool extra : {false, true}) {
    each_product(cuda(), 1, extra, [&](const ProductCase& c, DeviceCase& device, Shape s) {
      EXPECT_LE(worst_ratio(device.run(), c.run(*ref_), c.tolerances(sum_bound(s.in), true)), 1);
    });
  }
}

TEST_F(Cuda, SparseEqualsDenseOfMaskedRow) {
  each_product(cuda(), 1, true, [&](const ProductCase&, DeviceCase& device, Shape s) {
    const auto kept = cuda().make_selection(1, s.in);
    for (const int64_t keep : keeps(s.in)) {
      cuda().topk(device.x.mat, nullptr, keep, *kept);
      const auto fused = device.run_sparse(*kept), again = device.run_sparse(*kept);
      const DeviceRows masked(cuda(), Rows(1, s.in));
      cuda().expand(*kept, masked.mat);
      const auto dense = device.run(masked.mat);
      for (size_t p = 0; p < fused.size(); ++p) {
        EXPECT_EQ(bits_differ(fused[p].mat, dense[p].mat), 0) << keep;
        EXPECT_EQ(bits_differ(fused[p].mat, again[p].mat), 0) << keep;
      }
      if (keep != s.in) continue;
      const auto all = device.run();
      for (size_t p = 0; p < all.size(); ++p) EXPECT_EQ(bits_differ(fused[p].mat, all[p].mat), 0);
    }
  });
}

/// Outputs that a selection chooses are those of the whole product, bit for bit; what it drops is the rest of
/// its row.
TEST_F(Cuda, OutputsEqualTheProductWhereKept) {
  Random random(14);
  for (const int64_t rows : {1, 2, 17}) {
    for (const Shape s : kShapes) {
      if (rows * s.in * s.out > 3'000'000) continue;
      for (const Layout layout : kLayouts) {
        for (const DType dtype : kTypes) {
          SCOPED_TRACE(std::to_string(rows) + " rows " + std::to_string(s.in) + "→" + std::to_string(s.out) +
                       " " + dtype_name(dtype) + (layout == Layout::rows ? " rows" : " channels"));
          const ProductCase c(rows, s, dtype, layout, true, false);
          DeviceCase device(cuda(), c, true);
          const Rows score = Rows(rows, s.out).fill(random);
          for (int64_t j = 0; j < s.out; j += 3) score.mat.row(rows - 1)[j] = -0.0f;
          const DeviceRows scores(cuda(), score);
          // Alone, as matmul_outputs does it: how sums are shared depends on what is multiplied together.
          const DeviceRows whole(cuda(), Rows(rows, s.out));
          const Product alone{device.weight(0), whole.mat, false};
          cuda().matmul(device.x.mat, std::span(&alone, 1));
          const Rows all = whole.back();
          const auto kept = cuda().make_selection(rows, s.out);
          for (const int64_t keep : keeps(s.out)) {
            const DeviceRows y(cuda(), Rows(rows, s.out)), taken(cuda(), Rows(rows, s.out)),
                left(cuda(), Rows(rows, s.out));
            cuda().topk(scores.mat, nullptr, keep, *kept);
            cuda().matmul_outputs(device.x.mat, *kept, {device.weight(0), y.mat, false});
            cuda().expand(*kept, taken.mat);
            cuda().expand_dropped(*kept, scores.mat, left.mat);
            const Rows found = y.back(), in = taken.back(), out = left.back();
            EXPECT_TRUE(found.gaps_intact() && out.gaps_intact());
            int64_t wrong = 0;
            for (int64_t t = 0; t < rows; ++t) {
              for (int64_t j = 0; j < s.out; ++j) {
                wrong += !(found.at(t, j) == (in.at(t, j) != 0 ? all.at(t, j) : 0.0f));
                wrong += !(in.at(t, j) + out.at(t, j) == score.at(t, j) && in.at(t, j) * out.at(t, j) == 0);
              }
            }
            EXPECT_EQ(wrong, 0) << "keep " << keep;
          }
        }
      }
    }
  }
}

TEST_F(Cuda, MatmulMatchesTruth) {
  for (const Products arithmetic : {Products::f32, Products::bf16}) {
    const auto backend = find_cuda(arithmetic);
    for (const int64_t rows : {2, 17}) {
      for (const Shape s : kShapes) {
        if (rows * s.in * s.out > 3'000'000) continue;
        for (const Layout layout : kLayouts) {
          for (const DType dtype : kTypes) {
            const bool extra = (rows + s.in) % 2 == 0;
            const ProductCase c(rows, s, dtype, layout, extra, extra);
            DeviceCase device(*backend, c, rows == 2 || quantised(dtype));
            const double bound = sum_bound(s.in) + (arithmetic == Products::bf16 ? 4 * 0x1p-8 + 0x1p-15 : 0);
            EXPECT_LE(worst_ratio(device.run(), c.run(*ref_), c.tolerances(bound, true)), 1)
                << rows << " rows " << s.in << "→" << s.out << " " << dtype_name(dtype)
                << (layout == Layout::rows ? " rows " : " channels ") << (arithmetic == Products::bf16);
          }
        }
      }
    }
  }
}

TEST_F(Cuda, CopiesRows) {
  Random random(6);
  const DeviceRows from(cuda(), Rows(5, 33).fill(random)), to(cuda(), Rows(5, 33, 7));
  cuda().copy(from.mat, to.mat);
  EXPECT_EQ(bits_differ(to.back().mat, from.back().mat), 0);
  EXPECT_TRUE(to.back().gaps_intact());
}

/// What waits for a product must be there when somebody else asks for it.
TEST_F(Cuda, WaitingRowsAreSeen) {
  Random random(3);
  const int64_t n = 384;
  const Rows x = Rows(1, n).fill(random), up = Rows(1, n).fill(random), blank(1, n);
  const StoredWeight w(DType::bf16, Layout::channels, n, 256, false, random);
  const DeviceWeight weight(cuda(), w.weight, true);
  const DeviceRows dx(cuda(), x), dup(cuda(), up), y(cuda(), Rows(1, 256)), again(cuda(), Rows(1, 256));
  for (const bool gated : {false, true}) {
    const DeviceRows h(cuda(), blank), alone(cuda(), blank);
    const auto make = [&](Mat to) {
      gated ? cuda().glu(dx.mat, dup.mat, {}, to) : cuda().rms_norm(dx.mat, nullptr, 1e-5f, to);
    };
    make(alone.mat);
    const Rows expected = alone.back();  // made by a kernel of its own
    const Product product{weight.weight, y.mat, false}, second{weight.weight, again.mat, false};
    make(h.mat);
    cuda().matmul(h.mat, std::span(&product, 1));
    EXPECT_EQ(bits_differ(h.back().mat, expected.mat), 0);
    const auto kept = cuda().make_selection(1, n);
    make(h.mat);
    cuda().topk(h.mat, nullptr, 100, *kept);
    cuda().sparse_matmul(*kept, std::span(&product, 1));
    EXPECT_EQ(cuda().count(*kept), 100);
    EXPECT_EQ(bits_differ(h.back().mat, expected.mat), 0);
    cuda().topk(alone.mat, nullptr, 100, *kept);
    EXPECT_EQ(cuda().count(*kept), 100);  // flushed: a kernel of its own
    cuda().sparse_matmul(*kept, std::span(&second, 1));
    EXPECT_EQ(bits_differ(y.back().mat, again.back().mat), 0);
  }
}

/// A change of basis waits for the product that is added to it, both ways: taken along, and launched because
/// somebody looks or the product cannot take it.
TEST_F(Cuda, SkipsAreAdded) {
  constexpr int64_t kIn = 384, kSkip = 320, kTop = 64, kOut = 264;
  for (const DType dtype : kTypes) {
    for (const DType skip_dtype : kTypes) {
      for (const bool aligned : {true, false}) {
        if (!aligned && quantised(dtype)) continue;
        for (const bool looked : {false, true}) {
          SCOPED_TRACE(std::string(dtype_name(dtype)) + " after " + dtype_name(skip_dtype) +
                       (aligned ? "" : " unaligned") + (looked ? " looked at" : ""));
          Random random(5);
          const StoredWeight w(dtype, Layout::channels, kIn, kOut, true, random),
              skip(skip_dtype, Layout::channels, kSkip, kOut, false, random),
              top(DType::f32, Layout::channels, kTop, kOut, false, random);
          const DeviceWeight dw(cuda(), w.weight, aligned), dskip(cuda(), skip.weight, true),
              dtop(cuda(), top.weight, true);
          const Rows x = Rows(1, kSkip).fill(random), h = Rows(1, kIn).fill(random), truth(1, kOut);
          const DeviceRows dx(cuda(), x), dh(cuda(), h), y(cuda(), truth);
          const auto run = [&](Backend& backend, Mat from, Mat row, Mat to, const Weight& a, const Weight& b,
                               const Weight& c, const auto& look) {
            const auto kept = backend.make_selection(1, kIn);
            backend.rotate(from, a, to);
            backend.rotate(Mat(from.data, 1, kTop, from.stride), b, to, true);
            look();
            backend.topk(row, nullptr, 100, *kept);
            const Product product{c, to, true};
            backend.sparse_matmul(*kept, std::span(&product, 1));
          };
          run(*ref_, x.mat, h.mat, truth.mat, skip.weight, top.weight, w.weight, [] {});
          run(cuda(), dx.mat, dh.mat, y.mat, dskip.weight, dtop.weight, dw.weight, [&] {
            if (looked) {
              EXPECT_TRUE(y.back().gaps_intact());
            }
          });
          const Rows found = y.back();
          double error = 0, size = 0;
          for (int64_t j = 0; j < kOut; ++j) {
            error += std::pow(double{found.at(0, j)} - truth.at(0, j), 2);
            size += std::pow(double{truth.at(0, j)}, 2);
          }
          EXPECT_LE(std::sqrt(error), 1e-5 * std::sqrt(size));
          EXPECT_TRUE(found.gaps_intact());
        }
      }
    }
  }
}

TEST_F(Cuda, SelectionsMatchRef) {
  Random random(11);
  for (const int64_t n : {1, 2, 33, 257, 4096, 4099, 8200, 14336, 18947, 33000}) {
    const Rows x = hard_rows(n, random);
    std::vector<float> scale(static_cast<size_t>(n));
    for (float& s : scale) s = std::fabs(random.normal());
    const DeviceRows device(cuda(), x);
    const DeviceFloats device_scale(cuda(), scale);
    const int64_t all = x.mat.rows;
    const auto kept = cuda().make_selection(all, n), expected = ref_->make_selection(all, n);
    const auto compare = [&](int64_t first, int64_t rows) {
      const Rows truth(rows, n);
      ref_->expand(*expected, truth.mat);
      const DeviceRows found(cuda(), Rows(rows, n));
      cuda().expand(*kept, found.mat);
      EXPECT_EQ(cuda().count(*kept), ref_->count(*expected));
      EXPECT_EQ(bits_differ(found.back().mat, truth.mat), 0) << n << " rows " << rows << " from " << first;
    };
    const auto each = [&](const auto& body) {
      body(0, all);
      for (int64_t t = 0; t < all; ++t) body(t, 1);
    };
    for (const bool scaled : {false, true}) {
      const float* there = scaled ? device_scale.get() : nullptr;
      const float* here = scaled ? scale.data() : nullptr;
      each([&](int64_t first, int64_t rows) {
        for (const int64_t keep : keeps(n)) {
          cuda().topk(device.mat.slice(first, rows), there, keep, *kept);
          ref_->topk(x.mat.slice(first, rows), here, keep, *expected);
          compare(first, rows);
        }
        for (const float cut : {-1.0f, -0.0f, 0.0f, kTiny, 0.7f, kInf}) {
          cuda().threshold(device.mat.slice(first, rows), there, cut, *kept);
          ref_->threshold(x.mat.slice(first, rows), here, cut, *expected);
          compare(first, rows);
        }
      });
    }
  }
}

/// The selection that a product's own blocks make is the one of the kernel: the first ones write it
/// down.
TEST_F(Cuda, FusedSelectionsMatchRef) {
  Random random(12);
  for (const int64_t n : {33, 4096, 11008, 14336, 18944}) {
    const Rows x = hard_rows(n, random);
    std::vector<float> scale(static_cast<size_t>(n));
    for (float& s : scale) s = std::fabs(random.normal());
    const DeviceRows device(cuda(), x);
    const DeviceFloats device_scale(cuda(), scale);
    const StoredWeight w(DType::bf16, Layout::channels, n, 64, false, random);
    const DeviceWeight weight(cuda(), w.weight, true);
    const DeviceRows y(cuda(), Rows(1, 64));
    const Product product{weight.weight, y.mat, false};
    const auto kept = cuda().make_selection(1, n), expected = ref_->make_selection(1, n);
    for (int64_t t = 0; t < x.mat.rows; ++t) {
      for (const bool scaled : {false, true}) {
        for (const int64_t keep : keeps(n)) {
          // Twice: the second one starts from the very cut, among its bins; the first from that of another
          // keep.
          for (int time = 0; time < 2; ++time) {
            cuda().topk(device.mat.slice(t, 1), scaled ? device_scale.get() : nullptr, keep, *kept);
            cuda().sparse_matmul(*kept, std::span(&product, 1));
          }
          ref_->topk(x.mat.slice(t, 1), scaled ? scale.data() : nullptr, keep, *expected);
          const Rows truth(1, n);
          ref_->expand(*expected, truth.mat);
          const DeviceRows found(cuda(), Rows(1, n));
          cuda().expand(*kept, found.mat);
          EXPECT_EQ(cuda().count(*kept), keep);
          EXPECT_EQ(bits_differ(found.back().mat, truth.mat), 0) << n << " row " << t << " keep " << keep;
        }
        for (const float cut : {-1.0f, 0.0f, 0.7f}) {
          cuda().threshold(device.mat.slice(t, 1), scaled ? device_scale.get() : nullptr, cut, *kept);
          cuda().sparse_matmul(*kept, std::span(&product, 1));
          ref_->threshold(x.mat.slice(t, 1), scaled ? scale.data() : nullptr, cut, *expected);
          const Rows truth(1, n);
          ref_->expand(*expected, truth.mat);
          const DeviceRows found(cuda(), Rows(1, n));
          cuda().expand(*kept, found.mat);
          EXPECT_EQ(cuda().count(*kept), ref_->count(*expected));
          EXPECT_EQ(bits_differ(found.back().mat, truth.mat), 0) << n << " row " << t << " cut " << cut;
        }
      }
    }
  }
}

/// More outputs than the groups of blocks have in one round: each makes the row again for its next tile.
TEST_F(Cuda, LaterTilesSelectTheSame) {
  Random random(14);
  const int64_t n = 96, out = 150000;
  const Rows x = Rows(1, n).fill(random);
  std::vector<float> scale(static_cast<size_t>(n));
  for (float& s : scale) s = std::fabs(random.normal());
  const DeviceRows device(cuda(), x), row(cuda(), Rows(1, n)), sparse(cuda(), Rows(1, out)),
      dense(cuda(), Rows(1, out));
  const DeviceFloats device_scale(cuda(), scale);
  const StoredWeight w(DType::bf16, Layout::channels, n, out, false, random);
  const DeviceWeight weight(cuda(), w.weight, true);
  const auto kept = cuda().make_selection(1, n);
  const Product product{weight.weight, sparse.mat, false}, masked{weight.weight, dense.mat, false};
  const auto compare = [&](const char* what) {
    cuda().sparse_matmul(*kept, std::span(&product, 1));
    cuda().expand(*kept, row.mat);
    cuda().matmul(row.mat, std::span(&masked, 1));
    EXPECT_EQ(bits_differ(sparse.back().mat, dense.back().mat), 0) << what;
  };
  for (const int64_t keep : {1, 40, 95}) {
    cuda().topk(device.mat, device_scale.get(), keep, *kept);
    compare("topk");
  }
  cuda().threshold(device.mat, device_scale.get(), 0.5f, *kept);
  compare("threshold");
  cuda().rms_norm(device.mat, device_scale.get(), 1e-5f, row.mat);
  cuda().topk(row.mat, device_scale.get(), 40, *kept);
  compare("norm");
}

TEST_F(Cuda, NormGluEmbedMatchRef) {
  Random random(2);
  for (const int64_t dim : {1, 3, 33, 128, 768, 4099}) {
    for (const int64_t rows : kRows) {
      const Rows x = Rows(rows, dim).fill(random, 20), up = Rows(rows, dim).fill(random), truth(rows, dim);
      std::vector<float> gain(static_cast<size_t>(dim));
      for (float& g : gain) g = random.normal();
      const DeviceFloats device_gain(cuda(), gain);
      const DeviceRows dx(cuda(), x), dup(cuda(), up), y(cuda(), Rows(rows, dim));
      const auto expect_near = [&](double bound) {
        const Rows found = y.back();
        EXPECT_TRUE(found.gaps_intact());
        for (int64_t t = 0; t < rows; ++t) {
          for (int64_t i = 0; i < dim; ++i) {
            EXPECT_LE(std::fabs(double{found.at(t, i)} - truth.at(t, i)),
                      bound * std::fabs(truth.at(t, i)) + 1e-37);
          }
        }
      };
      cuda().rms_norm(dx.mat, device_gain.get(), 1e-5f, y.mat);
      ref_->rms_norm(x.mat, gain.data(), 1e-5f, truth.mat);
      expect_near(sum_bound(64) / 2 + 4 * kUnit);
      for (const Activation& activation : kActivations) {
        cuda().glu(dx.mat, dup.mat, activation, y.mat);
        ref_->glu(x.mat, up.mat, activation, truth.mat);
        expect_near(6 * kUnit);
        cuda().activate(dx.mat, activation, y.mat);
        ref_->activate(x.mat, activation, truth.mat);
        expect_near(6 * kUnit);
      }
      std::vector<int32_t> tokens;
      for (int64_t t = 0; t < rows; ++t) tokens.push_back(static_cast<int32_t>(random.below(9)));
      for (const DType dtype : kTypes) {
        const StoredWeight table(dtype, Layout::rows, dim, 9, false, random);
        const DeviceWeight device(cuda(), table.weight, true);
        cuda().embed(device.weight, tokens, y.mat);
        ref_->embed(table.weight, tokens, truth.mat);
        EXPECT_EQ(bits_differ(y.back().mat, truth.mat), 0);
      }
    }
  }
}

TEST_F(Cuda, SoftmaxMatchesRef) {
  Random random(7);
  for (const int64_t n : {1, 33, 1025, 32003}) {
    const Rows x = Rows(3, n).fill(random, 5), truth(x);
    const DeviceRows device(cuda(), x);
    cuda().log_softmax(device.mat);
    ref_->log_softmax(truth.mat);
    const Rows found = device.back();
    EXPECT_TRUE(found.gaps_intact());
    for (int64_t t = 0; t < 3; ++t) {
      for (int64_t i = 0; i < n; ++i) {
        const double bound = sum_bound(128) + 4 * kUnit + 2 * kUnit * std::fabs(truth.at(t, i));
        EXPECT_LE(std::fabs(double{found.at(t, i)} - truth.at(t, i)), bound);
      }
    }
  }
}

TEST_F(Cuda, LargestIsTheBeginningOfTheSortedRow) {
  Random random(8);
  for (const int64_t n : {1, 41, 1004, 16384, 16385, 32000, 128256, 151936, 300001}) {
    const Rows rows = rows_of_logits(n, random);
    const DeviceRows there(cuda(), rows);
    for (int64_t t = 0; t < rows.mat.rows; ++t) {
      const std::vector<float> row(rows.mat.row(t), rows.mat.row(t) + n);
      const DeviceFloats aligned(cuda(), row);
      const std::vector<Candidate> all = sorted_entries(row.data(), n);
      for (const int64_t count : largest_counts(n)) {
        SCOPED_TRACE(std::to_string(n) + " row " + std::to_string(t) + " count " + std::to_string(count));
        std::vector<Candidate> found(static_cast<size_t>(count));
        for (const Mat& x : {there.mat.slice(t, 1), Mat(const_cast<float*>(aligned.get()), 1, n)}) {
          cuda().largest(x, found);
          EXPECT_EQ(first_difference(found, all), -1);
        }
      }
    }
  }
}

TEST_F(Cuda, RopeMatchesRef) {
  Random random(4);
  for (const int64_t width : {2, 6, 64, 128}) {
    std::vector<float> inv_freq;
    for (int64_t i = 0; i < width / 2; ++i)
      inv_freq.push_back(static_cast<float>(std::pow(10000.0, -2.0 * double(i) / double(width))));
    const DeviceFloats there(cuda(), inv_freq);
    for (const int64_t rows : {1, 17}) {
      for (const int64_t pos : {0, 5, 100000}) {
        const Rows q = Rows(rows, 4 * width).fill(random), k = Rows(rows, 2 * width).fill(random), q1(q),
                   k1(k);
        const DeviceRows dq(cuda(), q), dk(cuda(), k);
        cuda().rope(dq.mat, dk.mat, width, pos, there.get());
        ref_->rope(q1.mat, k1.mat, width, pos, inv_freq.data());
        const Rows fq = dq.back(), fk = dk.back();
        for (const auto& [got, truth, start] : {std::tie(fq, q1, q), std::tie(fk, k1, k)}) {
          EXPECT_TRUE(got.gaps_intact());
          for (int64_t t = 0; t < rows; ++t) {
            for (int64_t i = 0; i < got.mat.cols; ++i) {
              const int64_t partner = i % width < width / 2 ? i + width / 2 : i - width / 2;
              const double length = std::hypot(start.at(t, i), start.at(t, partner));
              EXPECT_LE(std::fabs(double{got.at(t, i)} - truth.at(t, i)), 4 * kUnit * length) << width;
            }
          }
        }
      }
    }
  }
}

/// The shared list, and what a device does otherwise: many heads and wide ones of a group, many stretches.
std::vector<AttendCase> attend_cases() {
  std::vector<AttendCase> all = kAttendCases;
  all.push_back({24, 2, 128, 0, {130, 1, 1}});
  all.push_back({8, 1, 256, 0, {70, 1}});
  all.push_back({2, 2, 128, 0, {4200, 1}});
  return all;
}

/// Largest difference of two sets of rows; NaN where one has it.
double worst_error(const Rows& found, const Rows& truth) {
  double worst = 0;
  for (int64_t t = 0; t < found.mat.rows; ++t) {
    for (int64_t i = 0; i < found.mat.cols; ++i) {
      const double error = std::fabs(double{found.at(t, i)} - truth.at(t, i));
      if (std::isnan(error)) return error;
      worst = std::max(worst, error);
    }
  }
  return worst;
}

/// With and without the rotation that waits for attention.
TEST_F(Cuda, AttendMatchesRef) {
  for (const AttendCase& c : attend_cases()) {
    for (const DType dtype : kKvTypes) {
      Random random(8);
      int64_t total = 0;
      for (int64_t rows : c.steps) total += rows;
      const KvShape shape{2, c.kv_heads, c.width, total, dtype};
      const auto cache = cuda().make_kv_cache(shape), truth_cache = ref_->make_kv_cache(shape);
      EXPECT_EQ(cache->bytes_per_token(), truth_cache->bytes_per_token());
      std::vector<float> inv_freq;
      for (int64_t i = 0; i < c.width / 2; ++i) inv_freq.push_back(1.0f / static_cast<float>(1 + 3 * i));
      const DeviceFloats there(cuda(), inv_freq);
      // A score errs by sum_bound(E + 2) of Σ|q·k|/√E and a unit of f16 where a rotated key falls on the
      // other side of a rounding, the values' mean likewise. An int8 key would be a whole level off: there
      // ref takes the device's rotated rows. Its scale is a rounding more in a score and in a weight.
      const double half = dtype == DType::f16 ? 0x1p-11 : 0;
      const double score = (sum_bound(c.width + 2) + half) * 8 * 1.5 * std::sqrt(double(c.width));
      const double bound = 6 * (2 * score + 2 * sum_bound(257) + 8 * (double(total) / 64 + 1) * kUnit);
      int64_t pos = 0;
      for (const int64_t rows : c.steps) {
        for (const int64_t layer : {0, 1}) {
          const bool turn = layer == 1 && c.width % 2 == 0;
          Rows q = Rows(rows, c.heads * c.width).fill(random, 1.5f);
          Rows k = Rows(rows, c.kv_heads * c.width).fill(random), v = Rows(k).fill(random);
          const DeviceRows dq(cuda(), q), dk(cuda(), k), dv(cuda(), v),
              out(cuda(), Rows(rows, c.heads * c.width));
          const Rows truth(rows, c.heads * c.width);
          if (turn) {
            const DeviceRows turned_q(cuda(), q), turned_k(cuda(), k);
            cuda().rope(turned_q.mat, turned_k.mat, c.width, pos, there.get());
            ref_->rope(q.mat, k.mat, c.width, pos, inv_freq.data());
            if (dtype == DType::int8) {
              const Rows near_q = turned_q.back(), near_k = turned_k.back();
              EXPECT_LE(worst_error(near_q, q), 1e-5);
              EXPECT_LE(worst_error(near_k, k), 1e-5);
              ref_->attend(near_q.mat, near_k.mat, v.mat, *truth_cache, layer, pos, c.window, truth.mat);
            } else {
              ref_->attend(q.mat, k.mat, v.mat, *truth_cache, layer, pos, c.window, truth.mat);
            }
            cuda().rope(dq.mat, dk.mat, c.width, pos, there.get());
          } else {
            ref_->attend(q.mat, k.mat, v.mat, *truth_cache, layer, pos, c.window, truth.mat);
          }
          cuda().attend(dq.mat, dk.mat, dv.mat, *cache, layer, pos, c.window, out.mat);
          const Rows found = out.back();
          EXPECT_TRUE(found.gaps_intact());
          EXPECT_LE(worst_error(found, truth), bound)
              << dtype_name(dtype) << " heads " << c.heads << " width " << c.width << " rows " << rows;
        }
        pos += rows;
      }
    }
  }
}

/// As Int8KeepsAValueWithinHalfALevel of attend_test.cpp, one row alone and two together: one position gives
/// the stored value back, which is ref's to its roundings.
TEST_F(Cuda, Int8CacheKeepsAValueWithinHalfALevel) {
  Random random(10);
  for (const int64_t width : {37, 64, 256}) {
    Rows value = Rows(4, width).fill(random);
    for (int64_t e = 0; e < width; ++e) {
      value.mat.row(1)[e] *= 1e-20f;
      value.mat.row(2)[e] *= 1e-35f;
    }
    value.mat.row(3)[5] = kInf;
    for (const int64_t rows : {1, 2}) {
      for (int64_t t = 0; t < 4; ++t) {
        const KvShape shape{1, 1, width, rows, DType::int8};
        const auto cache = cuda().make_kv_cache(shape), truth_cache = ref_->make_kv_cache(shape);
        const Rows q = Rows(rows, width).fill(random);
        Rows v(rows, width);
        for (int64_t r = 0; r < rows; ++r) std::copy_n(value.mat.row(t), width, v.mat.row(r));
        const DeviceRows dq(cuda(), q), dk(cuda(), q), dv(cuda(), v), out(cuda(), Rows(rows, width));
        const Rows truth(rows, width);
        cuda().attend(dq.mat, dk.mat, dv.mat, *cache, 0, 0, 0, out.mat);
        ref_->attend(q.mat, q.mat, v.mat, *truth_cache, 0, 0, 0, truth.mat);
        const Rows found = out.back();
        float most = 0;
        for (int64_t e = 0; e < width; ++e) most = std::max(most, std::fabs(value.at(t, e)));
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t e = 0; e < width; ++e) {
            const float got = found.at(r, e);
            if (t == 3) {
              EXPECT_TRUE(std::isnan(got));
            } else if (t == 2) {
              EXPECT_EQ(got, 0);
            } else {
              EXPECT_LE(std::fabs(got - value.at(t, e)), most * (0.5 / 127 + 8 * kUnit)) << width;
              EXPECT_LE(std::fabs(got - truth.at(r, e)), most * 8 * kUnit) << width;
            }
          }
        }
      }
    }
  }
}

/// Contexts whose scores fit the shared memory of no device's blocks when they are split as usual: eight
/// heads of a group, 420,000 positions (on 227 KB 64 stretches hold 370,000). Earlier rows look at few
/// positions only.
TEST_F(Cuda, LongContextsFit) {
  constexpr int64_t kPositions = 420'000, kHeads = 8, kWidth = 4;
  for (const DType dtype : {DType::f16, DType::int8}) {
    Random random(13);
    const KvShape shape{1, 1, kWidth, kPositions + 1, dtype};
    const auto cache = cuda().make_kv_cache(shape), truth_cache = ref_->make_kv_cache(shape);
    for (const int64_t rows : {kPositions, int64_t{1}}) {
      const Rows q = Rows(rows, kHeads * kWidth).fill(random), k = Rows(rows, kWidth).fill(random),
                 v = Rows(rows, kWidth).fill(random), truth(rows, kHeads * kWidth);
      const DeviceRows dq(cuda(), q), dk(cuda(), k), dv(cuda(), v), out(cuda(), truth);
      const int64_t pos = rows == 1 ? kPositions : 0, window = rows == 1 ? 0 : 2;
      cuda().attend(dq.mat, dk.mat, dv.mat, *cache, 0, pos, window, out.mat);
      ref_->attend(q.mat, k.mat, v.mat, *truth_cache, 0, pos, window, truth.mat);
      EXPECT_LE(worst_error(out.back(), truth), 1e-4) << dtype_name(dtype) << " " << rows;
    }
  }
}

/// Models of the repository and, where the data folder is set, the larger trained ones; the demo model also
/// sparsified.
class CudaModel : public Cuda {
 protected:
  static std::vector<std::string> models() {
    std::vector<std::string> dirs = tiny_models();
    dirs.push_back(demo_model());
    if (const char* data = std::getenv("LAROSA_TEST_DATA")) {
      for (const char* name : {"stories260k", "mix-88m"})
        dirs.push_back(std::string(data) + "/models/" + name);
    }
    return dirs;
  }
};

TEST_F(CudaModel, LogitsMatchTheCpu) {
  ThreadPool pool(0);
  const auto cpu = make_cpu_backend({}, pool);
  for (const std::string& dir : models()) {
    SCOPED_TRACE(dir);
    const Model model = load_model(dir);
    Model placed = load_model(dir);
    place(placed, cuda());
    const auto tokens = some_tokens(model.config.vocab, std::min<size_t>(70, size_t(model.config.context)));
    const auto expected = all_logits(model, *cpu, tokens, tokens.size());
    for (const size_t chunk : {tokens.size(), size_t{7}, size_t{1}}) {
      const auto found = all_logits(placed, cuda(), tokens, chunk);
      EXPECT_LT(relative_rms(found, expected), 1e-4) << chunk << " at once";
      EXPECT_EQ(found, all_logits(placed, cuda(), tokens, chunk))
          << "two runs differ, " << chunk << " at once";
    }
  }
}

/// Scores next to a cut may fall on its other side in another order of sums, so that single logits differ;
/// what the model predicts on a text must not: 0.2 % of its perplexity, and no difference at all between two
/// runs.
TEST_F(CudaModel, SparsifiedPerplexityIsTheCpus) {
  ThreadPool pool(0);
  const auto cpu = make_cpu_backend({}, pool);
  const Tokenizer tokenizer = Tokenizer::load(demo_model());
  const auto calibration =
      tokenizer.encode(file_bytes(source_path("text/demo.calib.txt")).substr(0, 8000), false);
  const auto tokens = tokenizer.encode(file_bytes(source_path("text/demo.valid.txt")), false);
  for (const Form form : {Form::folded, Form::simulate}) {
    TemporaryDir dir;
    SparsifyOptions options;
    options.source = demo_model();
    options.output = dir / "sparse";
    options.choice.sparsity = 0.5;
    options.choice.form = form;
    options.progress = false;
    sparsify(options, calibration, 256, *cpu, pool);
    PerplexityOptions scored;
    scored.context = 512;
    scored.most_windows = 16;
    const auto measure = [&](Backend& backend) {
      Model model = load_model(dir / "sparse");
      place(model, backend);
      return perplexity_of(
                 perplexity(model, nullptr, backend, pool, tokens, scored, [](const auto&, int64_t) {}).nll)
          .value;
    };
    const double expected = measure(*cpu), found = measure(cuda());
    EXPECT_NEAR(found / expected, 1, 0.002);
    EXPECT_EQ(found, measure(cuda()));
  }
}

/// Calibration, planning, folding and rounding on the device: eigenvectors may turn where eigenvalues are
/// close, and cuts fall elsewhere, but what comes out predicts as well as what the cpu makes: to 1.5 %, where
/// two instruction sets of one cpu differ by up to 0.5 % on so short a text. Twice the same, bit for bit.
TEST_F(CudaModel, SparsifiesAsTheCpu) {
  ThreadPool pool(0);
  const auto cpu = make_cpu_backend({}, pool);
  const Tokenizer tokenizer = Tokenizer::load(demo_model());
  // Windows of 513 tokens: a whole batch of rows, and one alone.
  const auto calibration = calibration_windows(
      tokenizer.encode(file_bytes(source_path("text/demo.calib.txt")), false), 513, 6, "");
  const auto tokens = tokenizer.encode(file_bytes(source_path("text/demo.valid.txt")), false);
  const auto predicts = [&](const std::string& dir) {
    const Model model = load_model(dir);
    PerplexityOptions scored;
    scored.context = 512;
    scored.most_windows = 16;
    const auto r = perplexity(model, nullptr, *cpu, pool, tokens, scored, [](const auto&, int64_t) {});
    return perplexity_of(r.nll).value;
  };
  std::vector<SparsifyOptions> jobs(1);
  jobs[0].choice.allocation = Allocation::lagrangian;
  jobs.push_back(jobs[0]);
  jobs[1].choice.source = Source::separate;
  jobs[1].types = {DType::int4, DType::int8, DType::int8, DType::int8};
  jobs[1].gptq = true;
  for (const char* method : {"teal", "rsparse"}) {
    jobs.emplace_back();
    jobs.back().method = method;
    jobs.back().choice.sparsity = 0.3;
  }
  for (SparsifyOptions& options : jobs) {
    SCOPED_TRACE(options.method + (options.gptq ? " int4" : ""));
    TemporaryDir dir;
    options.source = demo_model();
    options.progress = false;
    const auto make = [&](const char* name, Backend& backend) {
      options.output = dir / name;
      sparsify(options, calibration, 513, backend, pool);
      return predicts(options.output);
    };
    const double expected = make("cpu", *cpu), found = make("cuda", cuda());
    EXPECT_NEAR(found / expected, 1, 0.015);
    make("again", cuda());
    for (const auto& entry : std::filesystem::directory_iterator(dir / "cuda")) {
      const std::string name = entry.path().filename().string();
      EXPECT_TRUE(file_bytes(dir / "cuda/" + name) == file_bytes(dir / "again/" + name)) << name;
    }
  }
}

/// As TrainedSparseEqualsDenseBitForBit of sparsify_test.cpp, and the cpu's logits.
TEST_F(CudaModel, TrainedSparseEqualsDense) {
  ThreadPool pool(0);
  const auto cpu = make_cpu_backend({}, pool);
  for (const std::string& source : tiny_models("sparse")) {
    SCOPED_TRACE(source);
    TemporaryDir dir;
    SparsifyOptions options;
    options.source = source;
    options.output = dir / "out";
    options.method = "dense";
    options.progress = false;
    sparsify(options, {}, 1, *cpu, pool);
    for (const std::string& from : {source, dir / "out"}) {
      const Model model = load_model(from);
      Model placed = load_model(from);
      place(placed, cuda());
      const auto tokens = some_tokens(model.config.vocab, 24);
      const auto expected = all_logits(model, *cpu, tokens, tokens.size());
      for (const size_t chunk : {tokens.size(), size_t{7}, size_t{1}}) {
        const auto found = all_logits(placed, cuda(), tokens, chunk);
        EXPECT_EQ(found, all_logits(placed, cuda(), tokens, chunk, true)) << chunk << " at once";
        EXPECT_LT(relative_rms(found, expected), 1e-4) << chunk << " at once";
      }
    }
  }
}

TEST_F(CudaModel, GreedyTextIsTheCpus) {
  for (const std::string& dir : models()) {
    if (!std::filesystem::exists(dir + "/tokenizer.json") &&
        !std::filesystem::exists(dir + "/tokenizer.model"))
      continue;
    SCOPED_TRACE(dir);
    EngineOptions options;
    const Engine cpu(dir, options);
    options.device = "cuda";
    const Engine gpu(dir, options);
    SessionOptions greedy;
    greedy.sampling.temperature = 0;
    const auto prompt = cpu.encode("Once upon a time there was");
    Session a(cpu, greedy), b(gpu, greedy);
    EXPECT_EQ(b.generate(prompt, 100, {}, true).text, a.generate(prompt, 100, {}, true).text);
  }
}

}  // namespace
}  // namespace larosa
