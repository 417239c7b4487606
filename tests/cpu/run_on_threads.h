// cpu::Threads::on_each by std::thread, for drivers without torch and OpenMP.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

inline void run_on_threads(int64_t n_threads, void (*run)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < n_threads; ++i) threads.emplace_back(run, context, i);
  for (std::thread& thread : threads) thread.join();
}
