#include "torch/cuda_library.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <torch/library.h>

#include "torch/bindings.h"
#include "torch/operators.h"

namespace fastopt {
namespace {

std::atomic<const cuda::Library*> loaded{nullptr};

const cuda::Library* open_library(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(handle != nullptr, path, " cannot be opened: ", dlerror());
  using Function = const cuda::Library* (*)();
  const auto function = reinterpret_cast<Function>(dlsym(handle, "fastopt_cuda_library"));
  TORCH_CHECK(function != nullptr, path, " is not fastopt's CUDA library");
  const cuda::Library* library = function();
  TORCH_CHECK(library->interface_version == cuda::kInterfaceVersion, path, " has interface ",
              library->interface_version, ", expected ", cuda::kInterfaceVersion);
  return library;
}

// Raises RuntimeError if the library cannot be opened, or the driver does not serve it.
void load_cuda(const std::string& path) {
  if (cuda_service().takes_cuda) return;
  const cuda::Library* library = open_library(path);
  TORCH_CHECK(!library->is_host_shim, path, " runs on the CPU, for tests");
  const int error = library->probe();
  TORCH_CHECK(error == 0, path, " finds no device that it can use: ", library->error_text(error));
  loaded = library;
  // Replaces the operators' references, which serve CUDA tensors until then.
  static torch::Library operators(torch::Library::IMPL, "fastopt", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  implement_updates(operators);
  implement_cross_entropy(operators);
  cuda_service().takes_cuda = true;
}

// For tests: CPU tensors go to a library whose kernels run on the CPU, until it is called with an empty path.
void load_host_shim(const std::string& path) {
  TORCH_CHECK(!cuda_service().takes_cuda, "the CUDA library is loaded");
  if (path.empty()) {
    cuda_service().takes_cpu = false;
    return;
  }
  const cuda::Library* library = open_library(path);
  TORCH_CHECK(library->is_host_shim, path, " does not run on the CPU");
  loaded = library;
  cuda_service().takes_cpu = true;
}

}  // namespace

const cuda::Library& cuda_library() { return *loaded.load(std::memory_order_acquire); }

CudaDevice::CudaDevice(c10::Device device) : device_(device) {
  if (!device.is_cuda()) return;  // the host shim
  guard_.reset_device(device);
  stream_ = c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

bool CudaDevice::is_capturing() const {
  bool is_capturing = false;
  check_cuda(cuda_library().is_capturing(stream_, &is_capturing), "asking for the stream's state", device_);
  return is_capturing;
}

int CudaDevice::multiprocessors() const {
  int count = 0;
  check_cuda(cuda_library().multiprocessors(&count), "asking for the device's size", device_);
  return count;
}

void check_cuda(int error, const std::string& what, c10::Device device) {
  TORCH_CHECK(error == 0, "fastopt: ", what, " on ", device, ": CUDA error ", error, ": ",
              cuda_library().error_text(error));
}

void bind_cuda_library(pybind11::module_& module) {
  module.def("load_cuda", &load_cuda);
  module.def("load_host_shim", &load_host_shim);
  module.def("cuda_architectures", [] {
    const cuda::Library* library = loaded;
    return std::string(library ? library->architectures : "");
  });
}

}  // namespace fastopt
