// Prints, for each number of threads and tasks and each thread that runs first, what that thread takes while no other
// runs. Fails unless threads that run one after the other, or at once, take each task once between them.
#include "cpu/parallel.h"

#include <cstdio>

#include "run_on_threads.h"

using namespace fastopt::cpu;

int64_t first_thread = 0;

void one_after_the_other(int64_t n, void (*run)(void*, int64_t), void* context) {
  for (int64_t i = 0; i < n; ++i) run(context, (first_thread + i) % n);
}

int main() {
  for (int n_threads = 1; n_threads <= 7; ++n_threads) {
    for (int64_t n_tasks = 0; n_tasks <= 70; ++n_tasks) {
      for (first_thread = 0; first_thread < n_threads; ++first_thread) {
        std::vector<int> times(n_tasks);
        std::vector<std::vector<int64_t>> taken;
        share_tasks({n_threads, one_after_the_other}, n_tasks, [&](auto&& next) {
          taken.emplace_back();
          for (int64_t task = next(); task < n_tasks; task = next()) {
            ++times[task];
            taken.back().push_back(task);
          }
        });
        for (int n : times)
          if (n != 1)
            return std::printf("%d threads, %d tasks: one ran %d times\n", n_threads, static_cast<int>(n_tasks), n), 1;
        std::printf("%d %d %d:", n_threads, static_cast<int>(n_tasks), static_cast<int>(first_thread));
        for (int64_t task : taken.front()) std::printf(" %d", static_cast<int>(task));
        std::printf("\n");
      }
      for (int repeat = 0; repeat < 5; ++repeat) {
        std::vector<std::atomic<int>> times(n_tasks);
        run_tasks({n_threads, run_on_threads}, n_tasks, [&](int64_t task) { ++times[task]; });
        for (auto& n : times)
          if (n != 1) return std::printf("at once: a task ran %d times\n", n.load()), 1;
      }
    }
  }
}
