// Kernels use the caller's thread pool through this interface.
#pragma once

#include <algorithm>  // max, min
#include <atomic>
#include <cstdint>
#include <vector>

#include "common.h"

namespace fastopt::cpu {

struct Threads {
  int count;  // threads that may run; with 1, no parallel region is opened
  // Calls run(context, i) for each i in [0, n_threads), each on a thread of its own where it can, in any order, and
  // returns when all are done.
  void (*on_each)(int64_t n_threads, void (*run)(void* context, int64_t i), void* context);
};

// Divides [0, n_tasks) among threads. Each thread calls run(next), which calls next() for its next task until that
// returns n_tasks. The initial shares are contiguous and equal, as torch divides an array, so that a thread finds in
// its caches the data that it wrote in another operation: writing lines that another core wrote last would take longer
// than the arithmetic. A thread takes half of its share at once, then a sixteenth at a time; when its share is empty,
// it steals from the other shares, but leaves each owner the last part, which would not end notably earlier if stolen.
template <class F>
void share_tasks(const Threads& threads, int64_t n_tasks, F&& run) {
  const int64_t n_threads = std::min<int64_t>(threads.count, n_tasks);
  if (n_threads <= 1) {
    run([task = int64_t{0}, n_tasks]() mutable { return task < n_tasks ? task++ : n_tasks; });
    return;
  }
  struct alignas(kLineBytes) Share {
    std::atomic<int64_t> begin;  // of the tasks that are not taken
    int64_t end;

    // Takes up to n tasks if more than n_kept are left, and returns the first; otherwise returns end.
    int64_t take(int64_t n, int64_t n_kept) {
      int64_t first = begin.load();
      while (first + n_kept < end && !begin.compare_exchange_weak(first, std::min(first + n, end))) continue;
      return first + n_kept < end ? first : end;
    }
  };
  std::vector<Share> shares(n_threads);
  const int64_t n_share = divide_up(n_tasks, n_threads);
  for (int64_t i = 0; i < n_threads; ++i) {
    shares[i].begin = std::min(i * n_share, n_tasks);
    shares[i].end = std::min((i + 1) * n_share, n_tasks);
  }
  const int64_t n_first = (n_share + 1) / 2, n_more = std::max<int64_t>(n_share / 16, 1);
  auto on_thread = [&](int64_t thread) {
    int64_t task = 0, end = 0, n = n_first, n_emptied = 0;
    run([&, n_tasks]() {
      while (task == end) {
        if (n_emptied == n_threads) return n_tasks;
        Share& share = shares[(thread + n_emptied) % n_threads];
        task = share.take(n, n_emptied == 0 ? 0 : n_more);
        end = std::min(task + n, share.end);
        n = n_more;
        n_emptied += task == end;
      }
      return task++;
    });
  };
  threads.on_each(
      n_threads, [](void* context, int64_t i) { (*static_cast<decltype(on_thread)*>(context))(i); }, &on_thread);
}

// Runs f(i) for each i in [0, n_tasks).
template <class F>
void run_tasks(const Threads& threads, int64_t n_tasks, F&& f) {
  share_tasks(threads, n_tasks, [&](auto&& next) {
    for (int64_t task = next(); task < n_tasks; task = next()) f(task);
  });
}

}  // namespace fastopt::cpu
