// The CPU update of many tensors, divided among threads.
#include "cpu/update.h"

#include <algorithm>  // max, min, upper_bound
#include <vector>

#include "cpu/update_loop.h"

namespace fastopt::cpu {
namespace {

// Elements below which another thread costs more than it saves: about 2 us of arithmetic.
constexpr int64_t kMinElementsPerThread = 8192;
// A tensor's fixed cost, in elements: finding it and starting its loop.
constexpr int64_t kSlabOverhead = 64;
// Elements up to which a thread keeps the same share each step, so that the caches keep the data; beyond, the threads
// take the next stretch when they are free.
constexpr int64_t kMaxElementsInCache = 1 << 24;
// How far ahead of the one that is updated a tensor is fetched, and how many bytes of each of its arrays.
constexpr int64_t kSlabsAhead = 4;
constexpr int64_t kFetchedBytes = 4 * kLineBytes;
// Divisions inside a tensor fall on whole cache lines of every stored type.
constexpr int64_t kAlignment = 64;

template <class S>
Update<S> find_update(RuleId id) {
  switch (id) {
#define FASTOPT_CASE(Rule) \
  case RuleId::k##Rule: return update_function<Rule<compute_t<S>>, S>();
    FASTOPT_RULES(FASTOPT_CASE)
#undef FASTOPT_CASE
    default: return nullptr;
  }
}

void update_slab(const Slab& slab, const RuleValue* rules, int64_t begin, int64_t end) {
  const RuleValue& rule = rules[slab.rule];
  with_stored_type(slab.dtype, [&](auto stored) {
    using S = decltype(stored);
    Arrays<S> arrays{static_cast<S*>(slab.param) + begin, static_cast<const S*>(slab.grad) + begin, {}};
    for (int s = 0; s < rule.n_states; ++s) arrays.state[s] = static_cast<S*>(slab.state[s]) + begin;
    find_update<S>(rule.id)(arrays, rule.bytes, end - begin);
  });
}

// Fetches the first lines of a tensor that comes soon: where each one lies tells nothing of the next.
void fetch_start(const Slab& slab, const RuleValue* rules) {
  const int64_t n_bytes = std::min<int64_t>(slab.numel * bytes_of(slab.dtype), kFetchedBytes);
  fetch(slab.param, n_bytes);
  fetch(slab.grad, n_bytes);
  for (int s = 0; s < rules[slab.rule].n_states; ++s) fetch(slab.state[s], n_bytes);
}

}  // namespace

void update(const Slab* slabs, int64_t n_slabs, const RuleValue* rules, const Threads& threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < n_slabs; ++i) total += slabs[i].numel + kSlabOverhead;
  const int64_t n_threads = std::min<int64_t>(threads.count, total / kMinElementsPerThread);
  if (n_threads <= 1) {
    for (int64_t i = 0; i < n_slabs; ++i) {
      if (i + kSlabsAhead < n_slabs) fetch_start(slabs[i + kSlabsAhead], rules);
      update_slab(slabs[i], rules, 0, slabs[i].numel);
    }
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
  const int64_t stretch = divide_up(total, n_tasks);
  const int64_t* const starts_begin = starts.data();

  // A stretch that ends inside a tensor ends on a cache line; the next begins where it ended.
  const auto local_cut = [&](int64_t slab, int64_t position) {
    const int64_t local = std::max<int64_t>(position - starts_begin[slab], 0);
    return std::min(divide_up(local, kAlignment) * kAlignment, slabs[slab].numel);
  };
  run_tasks(threads, n_tasks, [&](int64_t task) {
    const int64_t begin = task * stretch;
    const int64_t end = std::min(begin + stretch, total);
    int64_t slab = std::upper_bound(starts_begin, starts_begin + n_slabs, begin) - starts_begin - 1;
    for (; slab < n_slabs && starts_begin[slab] < end; ++slab) {
      if (slab + kSlabsAhead < n_slabs) fetch_start(slabs[slab + kSlabsAhead], rules);
      const int64_t first = local_cut(slab, begin);
      const int64_t last = local_cut(slab, end);
      if (first < last) update_slab(slabs[slab], rules, first, last);
    }
  });
}

}  // namespace fastopt::cpu
