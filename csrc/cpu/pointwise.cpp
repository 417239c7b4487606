// Divides a pointwise problem into tasks of fixed size, whatever the number of threads, and runs them.
#include "cpu/pointwise.h"

#include <array>
#include <vector>

#include "cpu/pointwise_loop.h"
#include "cpu/streaming.h"
#include "losses/pointwise_losses.h"

namespace fastopt::cpu {
namespace {

constexpr int64_t kTask = 8192;  // elements
// Elements below which another thread costs more than it saves.
constexpr int64_t kMinElementsPerThread = 16384;

template <class S, PointwiseWork kWork>
PointwiseFunction find_function(int loss) {
  static const auto table = []<int... kLosses>(std::integer_sequence<int, kLosses...>) {
    return std::array<PointwiseFunction, kPointwiseLosses>{pointwise_function<PointwiseLossAt<kLosses>, S, kWork>()...};
  }(std::make_integer_sequence<int, kPointwiseLosses>{});
  return table[loss];
}

PointwiseFunction find_function(const PointwiseProblem& p) {
  bool has_gradients = false;
  for (const void* gradient : p.gradients) has_gradients |= gradient != nullptr;
  return with_stored_type(p.dtype, [&](auto stored) {
    using S = decltype(stored);
    if (!has_gradients) return find_function<S, PointwiseWork::kValues>(p.loss);
    return p.wants_sum || p.losses ? find_function<S, PointwiseWork::kBoth>(p.loss)
                                   : find_function<S, PointwiseWork::kGradients>(p.loss);
  });
}

bool streams_gradients(const PointwiseProblem& p) {
  int64_t n_arrays = p.grad_outputs != nullptr, n_gradients = 0;
  for (const void* input : p.inputs) n_arrays += input != nullptr;
  for (const void* gradient : p.gradients) n_gradients += gradient != nullptr;
  return kCanStream && n_gradients > 0 && exceeds_caches((n_arrays + n_gradients) * p.n * bytes_of(p.dtype));
}

}  // namespace

double pointwise(const PointwiseProblem& p, const Threads& threads) {
  const bool streams = streams_gradients(p);
  const PointwiseFunction run = find_function(p);
  if (p.n <= kTask) return run({p, 0, p.n, streams});

  const int64_t n_tasks = divide_up(p.n, kTask);
  std::vector<double> sums(n_tasks);
  const auto n_threads = std::min<int64_t>(threads.count, p.n / kMinElementsPerThread);
  run_tasks({static_cast<int>(n_threads), threads.on_each}, n_tasks, [&](int64_t task) {
    const int64_t begin = task * kTask;
    sums[task] = run({p, begin, std::min(kTask, p.n - begin), streams});
  });
  return p.wants_sum ? sum_of(n_tasks, [&](int64_t task) { return sums[task]; }) : 0;
}

}  // namespace fastopt::cpu
