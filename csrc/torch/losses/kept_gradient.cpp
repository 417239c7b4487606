#include "torch/losses/kept_gradient.h"

#include <ATen/ops/empty.h>

#include <memory>  // unique_ptr
#include <mutex>
#include <utility>  // exchange, move

namespace fastopt {
namespace {

struct Context {
  std::mutex mutex;  // two threads may run one backward
  std::optional<LossGradient> kept;
  uint8_t byte = 0;
};

void delete_context(void* context) { delete static_cast<Context*>(context); }

}  // namespace

at::Tensor keep_gradient(LossGradient gradient) {
  auto context = std::make_unique<Context>();
  context->kept = std::move(gradient);
  void* const byte = &context->byte;
  c10::DataPtr memory(byte, context.release(), delete_context, c10::Device(c10::kCPU));
  const c10::Storage storage(c10::Storage::use_byte_size_t{}, 1, std::move(memory), /*allocator=*/nullptr,
                             /*resizable=*/false);
  return at::empty({0}, at::kByte).set_(storage, 0, {1}, {1});
}

std::optional<LossGradient> take_gradient(const at::Tensor& keeper) {
  if (!keeper.has_storage()) return std::nullopt;
  const c10::DataPtr& memory = keeper.storage().data_ptr();
  if (memory.get_deleter() != delete_context) return std::nullopt;
  auto* const context = static_cast<Context*>(memory.get_context());
  const std::lock_guard<std::mutex> lock(context->mutex);
  return std::exchange(context->kept, std::nullopt);
}

}  // namespace fastopt
