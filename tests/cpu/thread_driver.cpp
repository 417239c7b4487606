// The CPU kernels on std::thread, without torch and without OpenMP, for the thread sanitizer, which knows the one and
// not the other's runtime: several callers at once, each with threads of its own; results must be those of one thread.
//
//   c++ -std=c++20 -O1 -g -fsanitize=thread -DFASTOPT_ONE_LEVEL -Icsrc tests/cpu/thread_driver.cpp
//     $(find csrc/cpu -name '*.cpp')
// One instruction set: what chooses among several runs before the sanitizer is ready.
#include <atomic>
#include <cstdio>
#include <type_traits>  // is_same_v
#include <vector>

#include "cpu/cross_entropy/solve.h"
#include "cpu/cross_entropy/targets.h"
#include "cpu/pointwise.h"
#include "cpu/streaming.h"
#include "cpu/update.h"
#include "losses/pointwise_losses.h"
#include "rules/rules.h"
#include "run_on_threads.h"

using namespace fastopt;

namespace {

constexpr int32_t kAdamId = rule_id(2, 0);
static_assert(std::is_same_v<OptimizerAt<2>, AdamOptimizer>);

constexpr cpu::Threads kOne{1, nullptr}, kMany{4, run_on_threads};

std::vector<float> numbers(int64_t n, uint32_t seed) {
  std::vector<float> values(n);
  for (float& value : values) value = static_cast<float>((seed = seed * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1;
  return values;
}

std::vector<float> updated(const cpu::Threads& threads) {
  const int64_t sizes[] = {50'000, 1, 0, 33'333, 17};
  std::vector<std::vector<float>> memory;
  for (const int64_t n : sizes) {
    for (uint32_t i = 0; i < 4; ++i) memory.push_back(i == 3 ? std::vector<float>(n) : numbers(n, i + 1));
    for (float& value : memory[memory.size() - 2]) value = 0;
  }
  std::vector<TensorUpdate> updates;
  for (size_t i = 0; i < std::size(sizes); ++i) {
    TensorUpdate item{};
    item.param = memory[4 * i].data();
    item.grad = memory[4 * i + 1].data();
    item.kept[0] = memory[4 * i + 2].data();
    item.kept[1] = memory[4 * i + 3].data();
    item.numel = sizes[i];
    item.dtype = item.state_dtype = DType::kFloat32;
    updates.push_back(item);
  }
  const AdamOptions options{1e-3, 0.9, 0.999, 1e-8, 0.01, false, false, true};
  StepScalar scalars{0, true};
  for (int step = 1; step < 4; ++step) {
    const PackedRule rule = PackedRule::finished(kAdamId, Adam<float, false>::at_step(options, scalars));
    cpu::update(updates.data(), static_cast<int64_t>(updates.size()), &rule, 1, threads);
  }
  std::vector<float> all;
  for (const auto& values : memory) all.insert(all.end(), values.begin(), values.end());
  return all;
}

std::vector<float> losses(const cpu::Threads& threads, int64_t n_outer, int64_t n_classes, int64_t n_inner) {
  const std::vector<float> logits = numbers(n_outer * n_classes * n_inner, 7);
  std::vector<int64_t> target(n_outer * n_inner);
  for (size_t i = 0; i < target.size(); ++i) target[i] = i % 5 == 4 ? -100 : static_cast<int64_t>(i) % n_classes;
  // The gradient begins amid a cache line, and nothing may be written around it.
  constexpr size_t kAround = 37;
  constexpr float kGuard = 12345;
  std::vector<float> around(logits.size() + 2 * kAround, kGuard), each(target.size());
  CrossEntropyProblem problem{};
  problem.dtype = DType::kFloat32;
  problem.logits = logits.data();
  problem.logits_layout = problem.grad_layout = {n_outer, n_classes, n_inner, n_classes * n_inner, n_inner};
  problem.target = target.data();
  problem.ignore_index = -100;
  problem.label_smoothing = 0.1;
  problem.weight_sum = static_cast<double>(n_classes);
  problem.grad = around.data() + kAround;
  problem.grad_scale = 1;
  problem.losses = each.data();
  if (!cpu::tally_targets(problem, threads).is_valid) return {};
  double sum = 0;
  if (!cpu::cross_entropy(problem, threads, &sum)) return {};
  for (size_t i = 0; i < kAround; ++i) {
    if (around[i] != kGuard || around[around.size() - 1 - i] != kGuard) return {};
  }
  around.push_back(static_cast<float>(sum));
  around.insert(around.end(), each.begin(), each.end());
  return around;
}

// Mean squared error and both gradients.
std::vector<float> squared_errors(const cpu::Threads& threads) {
  const int64_t n = 70'001;
  const std::vector<float> input = numbers(n, 3), target = numbers(n, 5);
  std::vector<float> all(2 * n);
  PointwiseProblem problem{};
  problem.loss = 0;
  static_assert(std::is_same_v<PointwiseLossAt<0>, MseLoss>);
  problem.dtype = DType::kFloat32;
  problem.n = n;
  problem.inputs[0] = input.data();
  problem.inputs[1] = target.data();
  problem.wants_sum = true;
  problem.gradients[0] = all.data();
  problem.gradients[1] = all.data() + n;
  problem.grad_scale = 1 / static_cast<double>(n);
  all.push_back(static_cast<float>(cpu::pointwise(problem, threads)));
  return all;
}

// Results of several callers at once that differ from one thread's, or are none.
int count_wrong() {
  std::atomic<int> n_wrong{0};
  const std::vector<float> one[] = {updated(kOne),
                                    losses(kOne, 3000, 10, 1),
                                    losses(kOne, 300, 1000, 1),
                                    losses(kOne, 4, 19, 700),
                                    losses(kOne, 900, 10, 3),
                                    squared_errors(kOne)};
  for (const std::vector<float>& result : one) n_wrong += result.empty();
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      n_wrong += updated(kMany) != one[0];
      n_wrong += losses(kMany, 3000, 10, 1) != one[1];
      n_wrong += losses(kMany, 300, 1000, 1) != one[2];
      n_wrong += losses(kMany, 4, 19, 700) != one[3];
      n_wrong += losses(kMany, 900, 10, 3) != one[4];
      n_wrong += squared_errors(kMany) != one[5];
    });
  }
  for (std::thread& caller : callers) caller.join();
  return n_wrong;
}

}  // namespace

int main() {
  int n_wrong = count_wrong();
  cpu::set_streaming_threshold(0);
  n_wrong += count_wrong();
  std::printf("%d results differ from one thread's\n", n_wrong);
  return n_wrong != 0;
}
