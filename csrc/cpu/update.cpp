// The one CPU loop for all rules, and its division among threads.
#include "cpu/update.h"

#include <algorithm>  // max, min, upper_bound
#include <vector>

#include "cpu/isa.h"

namespace fastopt::cpu {
namespace {

// Elements below which another thread costs more than it saves: about 2 us of arithmetic.
constexpr int64_t kMinElementsPerThread = 8192;
// A tensor's fixed cost, in elements: finding it and starting its loop.
constexpr int64_t kSlabOverhead = 64;
// Elements up to which a thread keeps the same share each step, so that the caches keep the data; beyond, the threads
// take the next stretch when they are free.
constexpr int64_t kMaxElementsInCache = 1 << 24;
// Divisions inside a tensor fall on whole cache lines of every stored type.
constexpr int64_t kAlignment = 64;

using UpdateRange = void (*)(const Slab&, const void* rule, int64_t begin, int64_t end);

template <class Rule, class S>
FASTOPT_CLONES void update_range(const Slab& slab, const void* rule_bytes, int64_t begin, int64_t end) {
  using T = typename Rule::Real;
  constexpr int kStates = Rule::kStates;
  const Rule rule = *static_cast<const Rule*>(rule_bytes);
  S* __restrict param = static_cast<S*>(slab.param);
  const S* __restrict grad = static_cast<const S*>(slab.grad);
  S* __restrict state0 = static_cast<S*>(slab.state[0]);
  S* __restrict state1 = static_cast<S*>(slab.state[1]);
  S* __restrict state2 = static_cast<S*>(slab.state[2]);
  for (int64_t i = begin; i < end; ++i) {
    T value = load(param[i]);
    T state[kMaxStates] = {};
    if constexpr (kStates > 0) state[0] = load(state0[i]);
    if constexpr (kStates > 1) state[1] = load(state1[i]);
    if constexpr (kStates > 2) state[2] = load(state2[i]);
    rule(value, load(grad[i]), state);
    store(param[i], value);
    if constexpr (kStates > 0) store(state0[i], state[0]);
    if constexpr (kStates > 1) store(state1[i], state[1]);
    if constexpr (kStates > 2) store(state2[i], state[2]);
  }
}

UpdateRange find_update(RuleId id, DType dtype) {
  UpdateRange update = nullptr;
  with_stored_type(dtype, [&](auto stored) {
    using S = decltype(stored);
    switch (id) {
#define FASTOPT_CASE(Rule) \
  case RuleId::k##Rule: update = update_range<Rule<compute_t<S>>, S>; break;
      FASTOPT_RULES(FASTOPT_CASE)
#undef FASTOPT_CASE
      case RuleId::kCount: break;
    }
  });
  return update;
}

void update_slab(const Slab& slab, const RuleValue* rules, int64_t begin, int64_t end) {
  const RuleValue& rule = rules[slab.rule];
  find_update(rule.id, slab.dtype)(slab, rule.bytes, begin, end);
}

}  // namespace

void update(const Slab* slabs, int64_t n_slabs, const RuleValue* rules, const Threads& threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < n_slabs; ++i) total += slabs[i].numel + kSlabOverhead;
  const int64_t n_threads = std::min<int64_t>(threads.count, total / kMinElementsPerThread);
  if (n_threads <= 1) {
    for (int64_t i = 0; i < n_slabs; ++i) update_slab(slabs[i], rules, 0, slabs[i].numel);
    return;
  }

  // All tensors laid end to end: slab i begins at starts[i]. Each task takes one stretch of that line.
  thread_local std::vector<int64_t> starts;
  starts.clear();
  int64_t start = 0;
  for (int64_t i = 0; i < n_slabs; ++i) {
    starts.push_back(start);
    start += slabs[i].numel + kSlabOverhead;
  }
  const int64_t n_tasks = total <= kMaxElementsInCache ? n_threads : n_threads * 8;
  const int64_t stretch = (total + n_tasks - 1) / n_tasks;
  const int64_t* const starts_begin = starts.data();

  // A stretch that ends inside a tensor ends on a cache line; the next begins where it ended.
  const auto local_cut = [&](int64_t slab, int64_t position) {
    const int64_t local = std::max<int64_t>(position - starts_begin[slab], 0);
    return std::min((local + kAlignment - 1) / kAlignment * kAlignment, slabs[slab].numel);
  };
  run_tasks(threads, n_tasks, [&](int64_t task) {
    const int64_t begin = task * stretch;
    const int64_t end = std::min(begin + stretch, total);
    int64_t slab = std::upper_bound(starts_begin, starts_begin + n_slabs, begin) - starts_begin - 1;
    for (; slab < n_slabs && starts_begin[slab] < end; ++slab) {
      const int64_t first = local_cut(slab, begin);
      const int64_t last = local_cut(slab, end);
      if (first < last) update_slab(slabs[slab], rules, first, last);
    }
  });
}

}  // namespace fastopt::cpu
