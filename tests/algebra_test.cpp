// The algebra of calibration against plain loops: the host's, and the device's where there is one (label
// gpu).
#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "backend/algebra.h"
#include "device.h"

namespace larosa {
namespace {

using namespace cases;

Matrix random_matrix(int64_t rows, int64_t cols, Random& random) {
  Matrix m(rows, cols);
  for (double& v : m.data) v = double{random.normal()} + 1e-9 * double{random.normal()};
  return m;
}

Matrix transposed(const Matrix& m) {
  Matrix t(m.cols, m.rows);
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.cols; ++j) t.row(j)[i] = m.row(i)[j];
  return t;
}

Matrix product(const Matrix& a, const Matrix& b) {
  Matrix c(a.rows, b.cols);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t k = 0; k < a.cols; ++k)
      for (int64_t j = 0; j < b.cols; ++j) c.row(i)[j] += a.row(i)[k] * b.row(k)[j];
  return c;
}

double largest(const Matrix& m) {
  double most = 0;
  for (const double v : m.data) {
    if (std::isnan(v)) return v;
    most = std::max(most, std::fabs(v));
  }
  return most;
}

/// Largest difference of entries.
double worst(const Matrix& a, const Matrix& b) {
  Matrix difference = a;
  for (size_t i = 0; i < b.data.size(); ++i) difference.data[i] -= b.data[i];
  return a.rows == b.rows && a.cols == b.cols ? largest(difference) : std::nan("");
}

/// The lower triangle as the upper one says.
Matrix symmetric(Matrix m) {
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < i; ++j) m.row(i)[j] = m.row(j)[i];
  return m;
}

/// XᵀX with x of `rank` independent directions, each shorter than the one before.
Matrix gram(int64_t n, int64_t rank, Random& random) {
  Matrix x = random_matrix(rank, n, random);
  for (int64_t i = 0; i < rank; ++i)
    for (int64_t j = 0; j < n; ++j) x.row(i)[j] *= std::exp(-6.0 * double(i) / double(rank));
  return product(transposed(x), x);
}

/// Each machine's algebra, with the backend whose rows it takes.
class AlgebraTest : public testing::Test {
 protected:
  template <class Body>
  void each(const Body& body) {
    ThreadPool pool(2);
    const auto ref = make_ref_backend(), cuda = find_cuda();
    for (Backend* backend : {ref.get(), cuda.get()}) {
      if (!backend) continue;
      SCOPED_TRACE(backend == ref.get() ? "host" : "device");
      body(*backend, *backend->make_algebra(pool));
    }
    if (!cuda) std::puts("no CUDA device: the host's algebra was tested alone");
  }
};

TEST_F(AlgebraTest, ProductsMatchLoops) {
  each([](Backend&, Algebra& algebra) {
    Random random(1);
    for (const auto& [m, k, n] : {std::array<int64_t, 3>{1, 1, 1},
                                  {3, 5, 7},
                                  {1, 40, 33},
                                  {40, 1, 17},
                                  {129, 300, 257},
                                  {300, 129, 64}}) {
      const Matrix a = random_matrix(m, k, random), b = random_matrix(k, n, random), c = product(a, b);
      const double bound = 1e-14 * double(k + 3);
      EXPECT_LE(worst(algebra.multiply(a, b), c), bound) << m << " " << k << " " << n;
      EXPECT_LE(worst(algebra.multiply_transposed(transposed(a), b), c), bound) << m << " " << k << " " << n;
    }
  });
}

TEST_F(AlgebraTest, MomentsMatchLoops) {
  each([](Backend& backend, Algebra& algebra) {
    Random random(2);
    for (const int64_t d : {1, 3, 64, 130, 257}) {
      for (const Precision precision : {Precision::f32, Precision::f64}) {
        const auto moment = algebra.make_moment(d, precision);
        Matrix expected(d, d), of_matrices(d, d);
        int64_t total = 0;
        for (const int64_t rows : {17, 1, 300}) {
          // A part of wider rows, as one head's among all: strided, off any alignment.
          const Rows x = Rows(rows, d + 2).fill(random);
          const DeviceRows there(backend, x);
          moment->add(Mat(there.mat.data + 1, rows, d, there.mat.stride));
          Matrix wide(rows, d);
          for (int64_t t = 0; t < rows; ++t) std::copy_n(x.mat.row(t) + 1, d, wide.row(t));
          algebra.add_second_moment(wide, of_matrices);
          const Matrix part = product(transposed(wide), wide);
          for (size_t i = 0; i < part.data.size(); ++i) expected.data[i] += part.data[i];
          total += rows;
        }
        const Matrix found = moment->take();
        // Σ|x_i x_j| stays below 5 per row.
        const double exact = 5e-16 * double(total) * double(total);
        EXPECT_LE(worst(symmetric(of_matrices), expected), exact) << d;
        EXPECT_LE(worst(symmetric(found), expected),
                  precision == Precision::f64 ? exact : sum_bound(300) * 5 * double(total))
            << d;
      }
    }
  });
}

/// A row that waits to be made by whoever reads it is made for a moment too.
TEST_F(AlgebraTest, MomentsSeeRowsThatWait) {
  each([](Backend& backend, Algebra& algebra) {
    Random random(3);
    const Rows x = Rows(1, 64).fill(random);
    const DeviceRows from(backend, x), to(backend, Rows(1, 64));
    const auto moment = algebra.make_moment(64, Precision::f64);
    backend.rms_norm(from.mat, nullptr, 1e-5f, to.mat);
    moment->add(to.mat);
    const Matrix found = moment->take();
    const Rows y = to.back();
    for (int64_t i = 0; i < 64; ++i)
      for (int64_t j = i; j < 64; ++j) EXPECT_EQ(found.row(i)[j], double{y.at(0, i)} * double{y.at(0, j)});
  });
}

TEST_F(AlgebraTest, EigenvectorsDiagonalise) {
  each([](Backend&, Algebra& algebra) {
    Random random(4);
    for (const auto& [n, rank] :
         {std::pair<int64_t, int64_t>{1, 1}, {2, 2}, {33, 33}, {128, 40}, {300, 300}}) {
      SCOPED_TRACE(n);
      const Matrix h = gram(n, rank, random);
      Matrix v = h, again = h;
      for (int64_t i = 0; i < n; ++i)  // the lower triangle says nothing
        for (int64_t j = 0; j < i; ++j) v.row(i)[j] = again.row(i)[j] = 1e9;
      algebra.eigenvectors(v);
      algebra.eigenvectors(again);
      EXPECT_EQ(v.data, again.data);
      Matrix one(n, n);
      for (int64_t i = 0; i < n; ++i) one.row(i)[i] = 1;
      EXPECT_LE(worst(product(v, transposed(v)), one), 1e-12);
      Matrix turned = product(product(v, h), transposed(v));
      double before = -1e-12 * largest(h) * double(n);
      for (int64_t i = 0; i < n; ++i) {
        EXPECT_GE(turned.row(i)[i], before - 1e-12 * largest(h) * double(n)) << i;
        before = turned.row(i)[i];
        turned.row(i)[i] = 0;
      }
      EXPECT_LE(largest(turned), 1e-12 * largest(h) * double(n));
    }
  });
}

TEST_F(AlgebraTest, InvertedFactorsWhiten) {
  each([](Backend&, Algebra& algebra) {
    Random random(5);
    for (const int64_t n : {1, 2, 33, 129, 300}) {
      SCOPED_TRACE(n);
      Matrix a = gram(n, n, random);
      const double added = 0.01 * largest(a);
      for (int64_t i = 0; i < n; ++i) a.row(i)[i] += added;
      Matrix factor = a;
      algebra.invert_factor(factor);
      for (int64_t i = 0; i < n; ++i) {
        EXPECT_GT(factor.row(i)[i], 0);
        for (int64_t j = i + 1; j < n; ++j) factor.row(i)[j] = 0;
      }
      Matrix one(n, n);
      for (int64_t i = 0; i < n; ++i) one.row(i)[i] = 1;
      EXPECT_LE(worst(product(product(factor, a), transposed(factor)), one), 1e-10);
    }
    Matrix indefinite(2, 2);
    indefinite.data = {1, 2, 2, 1};
    EXPECT_THROW(algebra.invert_factor(indefinite), Error);
  });
}

/// One NaN off the diagonal is enough, wherever it stands and whatever the solver's blocks are.
TEST_F(AlgebraTest, NonFiniteMatricesAreRefused) {
  each([](Backend&, Algebra& algebra) {
    Random random(6);
    for (const int64_t n : {2, 33, 300}) {
      for (const auto& [i, j] : {std::pair<int64_t, int64_t>{0, 1}, {0, n - 1}, {n - 2, n - 1}}) {
        SCOPED_TRACE(testing::Message() << n << " at " << i << ", " << j);
        Matrix h = gram(n, n, random);
        h.row(i)[j] = h.row(j)[i] = std::nan("");
        Matrix factor = h;
        EXPECT_THROW(algebra.eigenvectors(h), Error);
        EXPECT_THROW(algebra.invert_factor(factor), Error);
      }
    }
  });
}

}  // namespace
}  // namespace larosa
