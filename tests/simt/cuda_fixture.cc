#include "tests/simt/cuda_fixture.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/cuda_backend.h"

namespace dejavu {

float ToleranceOf(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return 1e-4f;
    case DType::kInt8:
      return 4e-4f;
    default:
      return 1e-5f;
  }
}

CudaBackendTest::CudaBackendTest() {
  simt::GetEmulation() = simt::Emulation();
  simt::GetEmulation().order = GetParam();
  auto cuda = MakeCudaBackend(simt::ModuleUnderTest(), 0);
  EXPECT_TRUE(cuda.ok()) << cuda.status();
  cuda_ = *std::move(cuda);
  auto cpu = CreateCpuBackend({.threads = 1, .pin = false});
  EXPECT_TRUE(cpu.ok()) << cpu.status();
  cpu_ = *std::move(cpu);
}

Tensor CudaBackendTest::Device(const Tensor& host) {
  if (host.empty()) return host;
  Tensor t = host;
  const int64_t elements = host.rows == 0 ? 0 : (host.rows - 1) * host.stride + host.cols;
  auto buffer = cuda_->Allocate(elements * SizeOf(host.dtype));
  EXPECT_TRUE(buffer.ok()) << buffer.status();
  t.data = buffer->data();
  buffers_.push_back(*std::move(buffer));
  if (host.bytes() == 0) return t;
  std::vector<char> packed(host.bytes());
  cpu_->Download(packed.data(), host);
  cuda_->Upload(t, packed.data());
  return t;
}

LinearWeights CudaBackendTest::Device(LinearWeights w) {
  w.weight = Device(w.weight);
  w.bias = Device(w.bias);
  w.scale = Device(w.scale);
  return w;
}

Tensor CudaBackendTest::Host(const Tensor& device) {
  Tensor host = arena_.Make(device.dtype, device.rows, device.cols);
  cuda_->Download(host.data, device);
  cuda_->Synchronize();
  return host;
}

std::vector<int32_t> CudaBackendTest::Ints(const Tensor& device) {
  const Tensor host = Host(device);
  return {host.row<int32_t>(0), host.row<int32_t>(0) + host.rows * host.cols};
}

Matrix CudaBackendTest::ValuesOf(const LinearWeights& w) {
  Matrix values = Get(w.weight);
  for (int64_t r = 0; r < values.rows && !w.scale.empty(); ++r) {
    for (int64_t c = 0; c < values.cols; ++c) values.at(r, c) *= w.scale.row<float>(0)[r];
  }
  return w.layout == Layout::kOutputRows ? values : Transposed(values);
}

Matrix CudaBackendTest::MagnitudeOf(const Matrix& x, const LinearWeights& w) {
  Matrix magnitude;
  ReferenceLinear(x, ValuesOf(w), {}, &magnitude);
  return magnitude;
}

Matrix CudaBackendTest::LinearOn(Backend& backend, const Matrix& x, const LinearWeights& w, const Selection& selected,
                                 int64_t group) {
  const bool cpu = &backend == cpu_.get();
  const Tensor y = arena_.Put(Matrix(x.rows, w.outputs(), 77.0f));
  if (cpu) {
    backend.Linear(y, arena_.Put(x), w, selected, group);
    return Get(y);
  }
  const Tensor on_device = Device(y);
  backend.Linear(on_device, Put(x), w, selected, group);
  return Got(on_device);
}

void CudaBackendTest::ExpectClose(const Matrix& got, const Matrix& want, const Matrix& magnitude, float tolerance) {
  ASSERT_EQ(got.rows, want.rows);
  ASSERT_EQ(got.cols, want.cols);
  for (int64_t r = 0; r < got.rows; ++r) {
    for (int64_t c = 0; c < got.cols; ++c) {
      ASSERT_NEAR(got.at(r, c), want.at(r, c), tolerance * magnitude.at(r, c)) << "row " << r << ", column " << c;
    }
  }
}

// Once for the tests of all files.
INSTANTIATE_TEST_SUITE_P(Orders, CudaBackendTest, testing::Values(0, 1, 2),
                         [](const auto& info) { return absl::StrCat("Order", info.param); });

}  // namespace dejavu
