#include "engine/calibration/linear_algebra.h"

#include <Eigen/Dense>
#include <algorithm>
#include <random>

#include "kernels/base/check.h"

namespace dejavu {
namespace {

using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

Eigen::Map<const RowMajor> MapOf(const HostMatrix& m) { return {m.values.data(), m.rows, m.cols}; }

HostMatrix FromEigen(const Eigen::Ref<const RowMajor>& m) {
  HostMatrix result(m.rows(), m.cols());
  Eigen::Map<RowMajor>(result.values.data(), m.rows(), m.cols()) = m;
  return result;
}

constexpr int64_t kWholeUpTo = 512;  // below it the whole decomposition takes no second
constexpr int64_t kExtra = 16;
constexpr int kIterations = 8;

}  // namespace

HostMatrix WhiteningMatrix(const HostMatrix& covariance, double ridge) {
  const int64_t d = covariance.rows;
  Eigen::MatrixXd c = MapOf(covariance).cast<double>();
  c = ((c + c.transpose()) / 2.0).eval();
  c.diagonal().array() += std::max(ridge * c.trace() / static_cast<double>(d), 1e-12);
  const Eigen::LLT<Eigen::MatrixXd> factor(c);
  CHECK(factor.info() == Eigen::Success) << "a covariance with a ridge is positive definite";
  // c = L L^T; W = L^-T.
  const Eigen::MatrixXd identity = Eigen::MatrixXd::Identity(d, d);
  const Eigen::MatrixXd w = factor.matrixU().solve(identity);
  return FromEigen(w.cast<float>());
}

HostMatrix LeadingEigenvectors(Backend& backend, const HostMatrix& symmetric, int64_t count) {
  const int64_t d = symmetric.rows;
  CHECK(count <= d) << count << " of " << d;
  if (d <= kWholeUpTo) {
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(MapOf(symmetric).cast<double>());
    CHECK(solver.info() == Eigen::Success);
    const Eigen::MatrixXd vectors = solver.eigenvectors().rightCols(count).rowwise().reverse().transpose();
    return FromEigen(vectors.cast<float>());
  }
  const int64_t width = std::min(d, count + kExtra);
  HostMatrix rows(width, d);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (float& value : rows.values) value = normal(random);
  for (int i = 0; i < kIterations; ++i) {
    const HostMatrix product = Product(backend, rows, symmetric);
    const Eigen::HouseholderQR<Eigen::MatrixXf> qr(MapOf(product).transpose());
    const Eigen::MatrixXf q = qr.householderQ() * Eigen::MatrixXf::Identity(d, width);
    rows = FromEigen(q.transpose());
  }
  // Rayleigh-Ritz: the eigenvectors within the subspace, in order.
  const HostMatrix product = Product(backend, rows, symmetric);
  const Eigen::MatrixXd small = (MapOf(product) * MapOf(rows).transpose()).cast<double>();
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver((small + small.transpose()) / 2.0);
  const Eigen::MatrixXf turn = solver.eigenvectors().rightCols(count).rowwise().reverse().transpose().cast<float>();
  return FromEigen(turn * MapOf(rows));
}

}  // namespace dejavu
