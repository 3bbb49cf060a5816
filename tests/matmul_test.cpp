// Several rows: oneDNN's products in float32 and bf16.
#include <gtest/gtest.h>

#include <deque>
#include <map>

#include "products.h"

namespace larosa {
namespace {

using namespace cases;

// Both factors rounded to bf16 (8 significant bits): (1 + 2^-8)^2 − 1, over the float32 sum.
double bound_of(Products products, int64_t n) {
  return sum_bound(n) + (products == Products::bf16 ? 2 * 0x1p-8 + 0x1p-16 : 0);
}

TEST(Matmul, MatchesTruth) {
  const auto ref = make_ref_backend();
  std::map<Products, std::deque<Cpu>> cpus;
  for (const Products arithmetic : {Products::f32, Products::bf16})
    for (const std::string& isa : isas()) cpus[arithmetic].emplace_back(isa, 2, arithmetic);
  for (const Shape s : kShapes) {
    for (const int64_t rows : kRows) {
      if (rows == 1 || rows * s.in * s.out > 6'000'000) continue;
      for (const Layout layout : kLayouts) {
        for (const DType dtype : kTypes) {
          const bool extra = (rows + s.in) % 2 == 0;
          const ProductCase c(rows, s, dtype, layout, extra, extra);
          const auto truth = c.run(*ref);
          for (const auto& [arithmetic, sets] : cpus) {
            const auto tolerances = c.tolerances(bound_of(arithmetic, s.in));
            for (const Cpu& cpu : sets) {
              EXPECT_LE(worst_ratio(c.run(*cpu.backend), truth, tolerances), 1)
                  << cpu->describe() << " " << rows << " rows " << s.in << "→" << s.out << " "
                  << dtype_name(dtype);
            }
          }
        }
      }
    }
  }
}

/// More inputs than one panel holds (1024 as float32, 4096 as bf16).
TEST(Matmul, DeepPanels) {
  const auto ref = make_ref_backend();
  for (const Products arithmetic : {Products::f32, Products::bf16}) {
    const Cpu cpu(isas().front(), 2, arithmetic);
    for (const Layout layout : kLayouts) {
      for (const DType dtype : kTypes) {
        ProductCase c(5, {5000, 70}, dtype, layout, true, true);
        const auto got = c.run(*cpu.backend), truth = c.run(*ref);
        EXPECT_LE(worst_ratio(got, truth, c.tolerances(bound_of(arithmetic, 5000))), 1) << dtype_name(dtype);
      }
    }
  }
}

/// More rows than one block (1024).
TEST(Matmul, ManyRows) {
  const auto ref = make_ref_backend();
  for (const Products arithmetic : {Products::f32, Products::bf16}) {
    const Cpu cpu(isas().front(), 2, arithmetic);
    ProductCase c(1100, {70, 33}, DType::bf16, Layout::channels, true, true);
    const auto got = c.run(*cpu.backend), truth = c.run(*ref);
    EXPECT_LE(worst_ratio(got, truth, c.tolerances(bound_of(arithmetic, 70))), 1);
  }
}

TEST(Matmul, SparseEqualsDenseOfMaskedRows) {
  for (const std::string& isa : isas()) {
    for (const Products arithmetic : {Products::f32, Products::bf16}) {
      const Cpu cpu(isa, 2, arithmetic);
      for (const int64_t rows : {2, 3, 17}) {
        for (const DType dtype : kTypes) {
          const ProductCase c(rows, {257, 129}, dtype, Layout::channels, true, true);
          const auto kept = cpu->make_selection(rows, 257);
          for (const int64_t keep : keeps(257)) {
            cpu->topk(c.x.mat, nullptr, keep, *kept);
            const Rows masked(rows, 257);
            cpu->expand(*kept, masked.mat);
            const auto sparse = c.run_sparse(*cpu.backend, *kept), dense = c.run(*cpu.backend, masked.mat);
            for (size_t p = 0; p < sparse.size(); ++p) EXPECT_EQ(bits_differ(sparse[p].mat, dense[p].mat), 0);
            if (keep != 257) continue;
            const auto all = c.run(*cpu.backend);
            for (size_t p = 0; p < all.size(); ++p) EXPECT_EQ(bits_differ(sparse[p].mat, all[p].mat), 0);
          }
        }
      }
    }
  }
}

TEST(Matmul, ThreadsChangeNoBit) {
  for (const Products arithmetic : {Products::f32, Products::bf16}) {
    for (const Layout layout : kLayouts) {
      for (const DType dtype : kTypes) {
        for (const int64_t rows : {2, 17}) {
          const ProductCase c(rows, {1500, 900}, dtype, layout, true, true);
          const Cpu one(isas().front(), 1, arithmetic);
          const auto expected = c.run(*one.backend);
          for (const int threads : kThreads) {
            const Cpu cpu(isas().front(), threads, arithmetic);
            const auto got = c.run(*cpu.backend);
            for (size_t p = 0; p < got.size(); ++p) EXPECT_EQ(bits_differ(got[p].mat, expected[p].mat), 0);
          }
        }
      }
    }
  }
}

TEST(Matmul, RotationsAreFloat32WhateverTheProducts) {
  const ProductCase c(17, {96, 96}, DType::f32, Layout::channels, false, false);
  const Cpu wide(isas().front(), 2, Products::f32), narrow(isas().front(), 2, Products::bf16);
  const Rows expected(17, 96), found(17, 96);
  wide->rotate(c.x.mat, c.weights[0].weight, expected.mat);
  narrow->rotate(c.x.mat, c.weights[0].weight, found.mat);
  EXPECT_EQ(bits_differ(found.mat, expected.mat), 0);
  const auto product = c.run(*narrow.backend);
  EXPECT_GT(bits_differ(product[0].mat, expected.mat), 0);
}

}  // namespace
}  // namespace larosa
