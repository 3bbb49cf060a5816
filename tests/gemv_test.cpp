// One row: the decoding products, dense and sparse, on every instruction set.
#include <gtest/gtest.h>

#include <deque>
#include <set>

#include "backend/cpu/isa.h"
#include "products.h"

namespace larosa {
namespace {

using namespace cases;

std::string name_of(const std::string& isa, Shape s, DType dtype, Layout layout) {
  return isa + " " + std::to_string(s.in) + "→" + std::to_string(s.out) + " " + dtype_name(dtype) +
         (layout == Layout::rows ? " rows" : " channels");
}

template <class Body>
void each_type(const Body& body) {
  for (const Layout layout : kLayouts)
    for (const DType dtype : kTypes) body(layout, dtype);
}

template <class Body>
void each_case(const Body& body) {
  for (const std::string& isa : isas()) {
    const Cpu cpu(isa, 2);
    for (const Shape s : kShapes) {
      each_type([&](Layout layout, DType dtype) {
        SCOPED_TRACE(name_of(isa, s, dtype, layout));
        body(cpu, isa, s, dtype, layout);
      });
    }
  }
}

TEST(Gemv, MatchesTruth) {
  const auto ref = make_ref_backend();
  std::deque<Cpu> cpus;
  for (const std::string& isa : isas()) cpus.emplace_back(isa, 2);
  for (const Shape s : kShapes) {
    each_type([&](Layout layout, DType dtype) {
      for (const bool extra : {false, true}) {
        const ProductCase c(1, s, dtype, layout, extra, extra);
        for (int64_t i = 0; extra && i < s.in; i += 3) c.x.mat.data[i] = 0;
        const auto truth = c.run(*ref), tolerances = c.tolerances(sum_bound(s.in));
        for (const Cpu& cpu : cpus)
          EXPECT_LE(worst_ratio(c.run(*cpu.backend), truth, tolerances), 1)
              << name_of(cpu->describe(), s, dtype, layout);
      }
    });
  }
}

/// Instruction sets, and ways to read memory where this machine has their instructions.
std::vector<std::string> readings() {
  std::vector<std::string> found = isas();
  if (found.size() > 1 && found.front() == "avx512vnni") found.insert(found.end(), {"zen5", "intel"});
  return found;
}

/// Rows of more scales than are widened at once.
TEST(Gemv, LongRowsMatchTruth) {
  const auto ref = make_ref_backend();
  for (const std::string& isa : readings()) {
    const Cpu cpu(isa, 2);
    for (const DType dtype : {DType::int8, DType::int4}) {
      const ProductCase c(1, {8321, 9}, dtype, Layout::rows, false, false);
      EXPECT_LE(worst_ratio(c.run(*cpu.backend), c.run(*ref), c.tolerances(sum_bound(8321))), 1)
          << name_of(isa, {8321, 9}, dtype, Layout::rows);
    }
  }
}

TEST(Gemv, SparseEqualsDenseOfMaskedRow) {
  each_case([&](const Cpu& cpu, const std::string&, Shape s, DType dtype, Layout layout) {
    const ProductCase c(1, s, dtype, layout, true, true);
    const auto kept = cpu->make_selection(1, s.in);
    for (const bool holes : {false, true}) {  // some of which are kept where few are dropped
      for (int64_t i = 0; holes && i < s.in; i += 2) c.x.mat.data[i] = 0;
      for (const int64_t keep : keeps(s.in)) {
        cpu->topk(c.x.mat, nullptr, keep, *kept);
        const Rows masked(1, s.in);
        cpu->expand(*kept, masked.mat);
        const auto sparse = c.run_sparse(*cpu.backend, *kept), dense = c.run(*cpu.backend, masked.mat);
        for (size_t p = 0; p < sparse.size(); ++p)
          EXPECT_EQ(bits_differ(sparse[p].mat, dense[p].mat), 0) << keep;
        if (keep != s.in) continue;
        const auto all = c.run(*cpu.backend);
        for (size_t p = 0; p < all.size(); ++p) EXPECT_EQ(bits_differ(sparse[p].mat, all[p].mat), 0);
      }
    }
  });
}

TEST(Gemv, DroppedChannelsAreNotRead) {
  Random random(5);
  for (const std::string& isa : isas()) {
    const Cpu cpu(isa, 2);
    StoredWeight w(DType::f32, Layout::channels, 40, 70, false, random);
    const Rows x = Rows(1, 40).fill(random), y(1, 70);
    x.mat.data[7] = 0;
    for (int64_t j = 0; j < 70; ++j) {
      store_element(const_cast<void*>(w.weight.data), DType::f32, 7 * 70 + j, std::nan(""));
    }
    const auto kept = cpu->make_selection(1, 40);
    cpu->topk(x.mat, nullptr, 39, *kept);
    const Product product{w.weight, y.mat, false};
    cpu->sparse_matmul(*kept, std::span(&product, 1));
    for (int64_t j = 0; j < 70; ++j) EXPECT_FALSE(std::isnan(y.at(0, j))) << isa;
  }
}

/// Outputs chosen by a selection: as matmul gives them where its entry is not zero, and zero elsewhere.
TEST(Outputs, EqualTheProductWhereKept) {
  Random random(9);
  const auto ref = make_ref_backend();
  each_case([&](const Cpu& cpu, const std::string&, Shape s, DType dtype, Layout layout) {
    if (layout == Layout::channels && dtype != DType::f32 && dtype != DType::int4) return;  // only masked
    for (const int64_t rows : {1, 2, 17}) {
      if (rows > 1 && s.out > 1000) continue;
      const ProductCase c(rows, s, dtype, layout, true, false);
      const Rows score = Rows(rows, s.out).fill(random);
      for (int64_t j = 0; j < s.out; j += 3) score.mat.row(rows - 1)[j] = 0;
      const Weight& weight = c.weights[0].weight;
      const Rows all(rows, s.out);
      const Product dense{weight, all.mat, false};
      cpu->matmul(c.x.mat, std::span(&dense, 1));
      for (Backend* backend : {cpu.backend.get(), ref.get()}) {
        const auto kept = backend->make_selection(rows, s.out);
        const bool slow = backend == ref.get();  // once, on what is small
        if (slow && s.in * s.out > 50000) continue;
        for (const int64_t keep : slow ? std::vector{s.out / 2} : std::vector{int64_t{0}, s.out / 2, s.out}) {
          const Rows y(rows, s.out), mask(rows, s.out);
          backend->topk(score.mat, nullptr, keep, *kept);
          backend->expand(*kept, mask.mat);
          backend->matmul_outputs(c.x.mat, *kept, {weight, y.mat, false});
          EXPECT_TRUE(y.gaps_intact());
          int64_t wrong = 0;
          for (int64_t t = 0; t < rows; ++t) {
            for (int64_t j = 0; j < s.out; ++j) {
              const bool there = mask.at(t, j) != 0;
              if (slow) {
                wrong += there != (y.at(t, j) != 0);
              } else {
                wrong += !(y.at(t, j) == (there ? all.at(t, j) : 0.0f));
              }
            }
          }
          EXPECT_EQ(wrong, 0) << rows << " rows, keep " << keep;
        }
      }
    }
  });
}

TEST(Outputs, DroppedRowsAreNotRead) {
  Random random(10);
  for (const std::string& isa : isas()) {
    const Cpu cpu(isa, 2);
    const StoredWeight w(DType::f32, Layout::rows, 40, 70, false, random);
    const Rows x = Rows(1, 40).fill(random), score = Rows(1, 70).fill(random), y(1, 70);
    for (const int64_t j : {0, 7, 69}) {  // the first, one between, the last
      score.mat.data[j] = 0;
      for (int64_t i = 0; i < 40; ++i)
        store_element(const_cast<void*>(w.weight.data), DType::f32, j * 40 + i, std::nan(""));
    }
    const auto kept = cpu->make_selection(1, 70);
    for (const bool by_count : {false, true}) {  // kept zeros are not read either
      by_count ? cpu->topk(score.mat, nullptr, 70, *kept) : cpu->threshold(score.mat, nullptr, 0, *kept);
      cpu->matmul_outputs(x.mat, *kept, {w.weight, y.mat, false});
      for (int64_t j = 0; j < 70; ++j) EXPECT_FALSE(std::isnan(y.at(0, j))) << isa;
    }
  }
}

TEST(Outputs, ThreadsChangeNoBit) {
  Random random(12);
  const Rows x = Rows(1, 257).fill(random), score = Rows(1, 1409).fill(random);
  for (const std::string& isa : isas()) {
    for (const DType dtype : kTypes) {
      const StoredWeight w(dtype, Layout::rows, 257, 1409, true, random);
      std::set<std::vector<float>> found;
      for (const int threads : kThreads) {
        const Cpu cpu(isa, threads);
        const auto kept = cpu->make_selection(1, 1409);
        std::vector<float> y(1409);
        cpu->topk(score.mat, nullptr, 500, *kept);
        cpu->matmul_outputs(x.mat, *kept, {w.weight, Mat(y.data(), 1, 1409), false});
        found.insert(y);
      }
      EXPECT_EQ(found.size(), 1u) << isa << " " << dtype_name(dtype);
    }
  }
}

/// Nor what an earlier, longer row has left behind.
TEST(Gemv, PaddingOfRowsDoesNotCount) {
  Random random(7);
  for (const std::string& isa : isas()) {
    const Cpu cpu(isa, 2);
    for (const DType dtype : {DType::int8, DType::int4}) {
      for (const int64_t n : {257, 320}) {  // 320: the last group of 32 is a whole one
        const StoredWeight w(dtype, Layout::rows, n, 70, false, random),
            longer(dtype, Layout::rows, 384, 70, false, random);
        const Rows x = Rows(1, n).fill(random), long_x = Rows(1, 384).fill(random), y(1, 70), z(1, 70);
        const Product first{w.weight, y.mat, false}, before{longer.weight, z.mat, false},
            again{w.weight, z.mat, false};
        cpu->matmul(x.mat, std::span(&first, 1));
        fill_padding(w.weight);
        cpu->matmul(long_x.mat, std::span(&before, 1));
        cpu->matmul(x.mat, std::span(&again, 1));
        EXPECT_EQ(bits_differ(y.mat, z.mat), 0) << isa << " " << dtype_name(dtype) << " " << n;
      }
    }
  }
}

/// What is wrong with an input is seen in the output, and does not hide in an integer.
TEST(Gemv, NotANumberComesThrough) {
  Random random(6);
  for (const std::string& isa : isas()) {
    const Cpu cpu(isa, 2);
    each_type([&](Layout layout, DType dtype) {
      const StoredWeight w(dtype, layout, 200, 300, false, random);
      for (const float bad :
           {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        const Rows x = Rows(1, 200).fill(random), y(1, 300);
        x.mat.data[150] = bad;
        const Product product{w.weight, y.mat, false};
        cpu->matmul(x.mat, std::span(&product, 1));
        int64_t finite = 0;
        for (int64_t j = 0; j < 300; ++j) finite += std::isfinite(y.at(0, j));
        EXPECT_EQ(finite, 0) << name_of(isa, {200, 300}, dtype, layout);
      }
    });
  }
}

TEST(Gemv, ThreadsChangeNoBit) {
  for (const std::string& isa : isas()) {
    each_type([&](Layout layout, DType dtype) {
      for (const Shape shape : {Shape{257, 1409}, Shape{70, 4096}}) {
        const ProductCase c(1, shape, dtype, layout, true, true);
        const Cpu one(isa, 1);
        const auto expected = c.run(*one.backend);
        for (const int threads : kThreads) {
          const Cpu cpu(isa, threads);
          for (int repeat = 0; repeat < 3; ++repeat) {
            const auto got = c.run(*cpu.backend);
            for (size_t p = 0; p < got.size(); ++p) EXPECT_EQ(bits_differ(got[p].mat, expected[p].mat), 0);
          }
        }
      }
    });
  }
}

/// How memory is read is the machine's business: the same bits on Zen 5 and Intel's servers as with the same
/// instructions elsewhere. Channels that follow one another, short enough to be read one at a time or not,
/// and channels that do not follow; one pass and several; any number of threads; eight runs of rows and what
/// is left of them.
TEST(Gemv, ReadingChangesNoBit) {
  if (readings().size() == isas().size()) GTEST_SKIP();
  const Cpu any("avx512vnni", 2);
  std::deque<Cpu> others;
  for (const char* name : {"zen5", "intel"})
    for (const int threads : {1, 2, 3}) others.emplace_back(name, threads);
  const auto expect_same = [&](const ProductCase& c, const std::string& name, const auto& run) {
    const auto expected = run(c, any);
    for (const Cpu& cpu : others) {
      const auto got = run(c, cpu);
      for (size_t p = 0; p < got.size(); ++p) EXPECT_EQ(bits_differ(got[p].mat, expected[p].mat), 0) << name;
    }
  };
  std::vector<Shape> shapes = kShapes;
  shapes.insert(shapes.end(), {{257, 1409}, {200, 2081}, {150, 4224}, {70, 16640}});
  for (const Shape s : shapes) {
    for (const DType dtype : kTypes) {
      const ProductCase c(1, s, dtype, Layout::channels, true, true);
      for (const int64_t keep : keeps(s.in)) {
        const auto kept = any->make_selection(1, s.in);
        any->topk(c.x.mat, nullptr, keep, *kept);
        expect_same(c, name_of("reading", s, dtype, Layout::channels) + " " + std::to_string(keep),
                    [&](const ProductCase& p, const Cpu& cpu) { return p.run_sparse(*cpu.backend, *kept); });
      }
    }
  }
  shapes = kShapes;
  shapes.insert(shapes.end(), {{33, 6}, {1409, 29}, {4224, 38}, {9000, 17}});
  for (const Shape s : shapes) {
    for (const DType dtype : kTypes) {
      expect_same(ProductCase(1, s, dtype, Layout::rows, true, true),
                  name_of("reading", s, dtype, Layout::rows),
                  [&](const ProductCase& p, const Cpu& cpu) { return p.run(*cpu.backend); });
    }
  }
}

TEST(Gemv, RotateIsAProduct) {
  Random random(3);
  for (const std::string& isa : isas()) {
    const Cpu cpu(isa, 2);
    const StoredWeight basis(DType::f32, Layout::channels, 96, 96, false, random);
    for (const int64_t rows : kRows) {
      const Rows x = Rows(rows, 96).fill(random), y(rows, 96), z(rows, 96);
      const Product product{basis.weight, z.mat, false};
      cpu->rotate(x.mat, basis.weight, y.mat);
      cpu->matmul(x.mat, std::span(&product, 1));
      EXPECT_EQ(bits_differ(y.mat, z.mat), 0);
    }
  }
}

TEST(Isa, OverrideTakesEffect) {
  const std::pair<const char*, std::vector<std::string>> expected[] = {{"avx512vnni", {"AVX3_DL,"}},
                                                                       {"zen5", {"AVX3_DL for Zen 5,"}},
                                                                       {"intel", {"AVX3_DL for Intel,"}},
                                                                       {"avx512", {"AVX3,"}},
                                                                       {"avx2", {"AVX2"}},
                                                                       {"neon", {"NEON"}},
                                                                       {"portable", {"SCALAR", "EMU128"}}};
  for (const std::string& isa : readings()) {
    const Cpu cpu(isa, 1);
    bool named = false;
    for (const auto& [name, targets] : expected) {
      for (const std::string& target : targets) {
        named |= isa == name && cpu->describe().find(", " + target) != std::string::npos;
      }
    }
    EXPECT_TRUE(named) << isa << ": " << cpu->describe();
  }
}

/// A set's name alone says nothing of what it reads with.
TEST(Isa, ReadingsHaveKernelsOfTheirOwn) {
  if (readings().size() == isas().size()) GTEST_SKIP();
  std::set<decltype(Kernels::gemv_chain)> chains;
  std::set<decltype(Kernels::gemv_rows)> rows;
  for (const char* isa : {"avx512vnni", "zen5", "intel"}) {
    setenv("LAROSA_ISA", isa, 1);
    const Kernels kernels = choose_kernels();
    chains.insert(kernels.gemv_chain);
    rows.insert(kernels.gemv_rows);
  }
  unsetenv("LAROSA_ISA");
  EXPECT_EQ(chains.size(), 3u);
  EXPECT_GE(rows.size(), 2u);  // Zen 5 reads rows as any other does
}

TEST(Isa, OneDnnsSetIsOneOfTheMachines) {
#if defined(__aarch64__)
  const std::string names[] = {"(oneDNN asimd", "(oneDNN sve_"};
#else
  const std::string names[] = {"(oneDNN sse", "(oneDNN avx"};
#endif
  const Cpu cpu(isas().front(), 1);
  const std::string text = cpu->describe();
  EXPECT_TRUE(text.find(names[0]) != std::string::npos || text.find(names[1]) != std::string::npos) << text;
}

TEST(Isa, UnknownIsAnError) {
  EXPECT_THROW(Cpu("mmx", 1), Error);
}

}  // namespace
}  // namespace larosa
