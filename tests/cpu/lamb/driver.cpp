// A rule that needs sums over its tensor before the update, and has a tail: on the CPU on one thread and on several,
// and by the CUDA kernels on the CPU, against the formula in double. Prints a line for each case that is wrong.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../run_on_threads.h"
#include "cpu/update.h"
#include "cuda/update.h"
#include "rules/rules.h"

using namespace fastopt;

namespace {

const LambOptions kOptions{0.1, 0.9, 0.99, 1e-6, 0.01};
// Around a block of 16 bits, around what is added together and what one thread sums, and around chunks of CUDA.
const int64_t kSizes[] = {1, 31, 33, 1023, 1025, 32'769, 0, 100'001, 2048};
constexpr double kRounding16 = 1.05 / 256;  // of bfloat16, in which the tail is stored
constexpr int kArrays = 4;                  // param, grad, exp_avg, exp_avg_sq

std::vector<double> drawn(int64_t n, uint32_t seed, bool is_positive) {
  std::vector<double> values(n);
  for (double& value : values) {
    value = static_cast<double>((seed = seed * 1664525u + 1013904223u) >> 8) / (1 << 23) + (is_positive ? 0.1 : -1);
  }
  return values;
}

// The tensors of a step.
template <class P>
struct Tensors {
  std::vector<std::vector<P>> arrays;  // kArrays each
  std::vector<std::vector<BFloat16>> tails;
  std::vector<TensorUpdate> updates;

  explicit Tensors(DType dtype) {
    for (const int64_t n : kSizes) {
      for (uint32_t a = 0; a < kArrays; ++a) {
        std::vector<P> stored(n);
        const auto values = drawn(n, a + 7 * static_cast<uint32_t>(n), a == 3);
        for (int64_t i = 0; i < n; ++i) store(stored[i], static_cast<compute_t<P>>(values[i]));
        arrays.push_back(stored);
      }
      tails.emplace_back(n);
    }
    for (size_t t = 0; t < std::size(kSizes); ++t) {
      TensorUpdate item{};
      item.param = arrays[kArrays * t].data();
      item.grad = arrays[kArrays * t + 1].data();
      item.kept[0] = arrays[kArrays * t + 2].data();
      item.kept[1] = arrays[kArrays * t + 3].data();
      item.kept[3] = tails[t].data();
      item.numel = kSizes[t];
      item.dtype = item.state_dtype = dtype;
      updates.push_back(item);
    }
  }
};

template <class T>
PackedRule packed_rule() {
  StepScalar scalars{0, true};
  return PackedRule::finished(rule_id(0, 0), Lamb<T>::at_step(kOptions, scalars));
}

int n_wrong = 0;

double error(double found, double expected) { return std::fabs(found - expected) / std::fmax(1, std::fabs(expected)); }

// `before`: the same tensors that no step has changed. tolerance: of error().
template <class P>
void check(const char* what, const Tensors<P>& found, const Tensors<P>& before, double tolerance) {
  const auto [lr, beta1, beta2, eps, decay] = kOptions;
  for (size_t t = 0; t < std::size(kSizes); ++t) {
    const auto value = [&](const Tensors<P>& tensors, int a, int64_t i) {
      return static_cast<double>(load(tensors.arrays[kArrays * t + a][i]));
    };
    std::vector<double> direction, expected[3];
    long double param_norm = 0, direction_norm = 0;
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      const double param = value(before, 0, i), grad = value(before, 1, i);
      expected[1].push_back(beta1 * value(before, 2, i) + (1 - beta1) * grad);
      expected[2].push_back(beta2 * value(before, 3, i) + (1 - beta2) * grad * grad);
      direction.push_back(expected[1][i] / (std::sqrt(expected[2][i]) + eps) + decay * param);
      param_norm += static_cast<long double>(param) * param;
      direction_norm += static_cast<long double>(direction[i]) * direction[i];
    }
    const auto ratio = static_cast<double>(std::sqrt(param_norm / direction_norm));
    double worst = 0, worst_tail = 0;
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      expected[0].push_back(value(before, 0, i) - lr * ratio * direction[i]);
      const int places[] = {0, 2, 3};
      for (int k = 0; k < 3; ++k) {
        worst = std::fmax(worst, error(value(found, places[k], i), expected[k][i]));
      }
      worst_tail = std::fmax(worst_tail, error(load(found.tails[t][i]), expected[0][i]));
    }
    if (!(worst <= tolerance) || !(worst_tail <= kRounding16)) {
      std::printf("%s, %lld elements: off by %g, the tail by %g\n", what, static_cast<long long>(kSizes[t]), worst,
                  worst_tail);
      ++n_wrong;
    }
  }
}

template <class P>
void run_cuda(Tensors<P>& tensors, DType dtype, const PackedRule& rule) {
  std::vector<cuda::UpdateEntry> entries;
  cuda::Update update{};
  update.chunk = cuda::kChunkUnit;
  for (const TensorUpdate& item : tensors.updates) {
    cuda::UpdateEntry entry{};
    entry.param = item.param;
    entry.grad = const_cast<void*>(item.grad);
    memcpy(entry.kept, item.kept, sizeof(entry.kept));
    entry.numel = item.numel;
    entry.first_chunk = update.n_chunks;
    update.n_chunks += static_cast<int32_t>(divide_up(item.numel, static_cast<int64_t>(update.chunk)));
    entry.is_aligned = true;  // as operator new aligns
    entries.push_back(entry);
  }
  std::vector<double> sums(update.n_chunks * rule.n_sums, NAN);
  update.rule = rule.id;
  update.param_dtype = update.state_dtype = dtype;
  update.rules = &rule;
  update.n_rules = 1;
  update.entries = entries.data();
  update.n_entries = static_cast<int32_t>(entries.size());
  update.sums = sums.data();
  const int error = cuda::launch(update, nullptr);
  if (error != 0) std::printf("launch: error %d\n", error), ++n_wrong;
}

template <class P>
void run_all(const char* name, DType dtype, double tolerance) {
  const PackedRule rule = packed_rule<compute_t<P>>();
  const Tensors<P> before(dtype);
  Tensors<P> on_one(dtype), on_many(dtype), on_cuda(dtype);
  const auto n = static_cast<int64_t>(before.updates.size());
  cpu::update(on_one.updates.data(), n, &rule, 1, {1, nullptr});
  cpu::update(on_many.updates.data(), n, &rule, 1, {4, run_on_threads});
  run_cuda(on_cuda, dtype, rule);
  check(name, on_one, before, tolerance);
  check((std::string(name) + " by CUDA").c_str(), on_cuda, before, tolerance);
  for (size_t a = 0; a < on_one.arrays.size(); ++a) {
    const size_t n_bytes = on_one.arrays[a].size() * sizeof(P);
    if (n_bytes > 0 && memcmp(on_one.arrays[a].data(), on_many.arrays[a].data(), n_bytes) != 0) {
      std::printf("%s: four threads differ from one\n", name);
      ++n_wrong;
    }
  }
}

}  // namespace

int main() {
  run_all<double>("float64", DType::kFloat64, 1e-14);
  run_all<float>("float32", DType::kFloat32, 1e-6);
  run_all<BFloat16>("bfloat16", DType::kBFloat16, kRounding16);
  run_all<Half>("float16", DType::kFloat16, 1.05 / 2048);
  return n_wrong > 0;
}
