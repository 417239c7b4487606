#include "torch/context.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>  // pthread_atfork
#endif

namespace fastopt {
namespace {

std::atomic<bool> forked{false};

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

}  // namespace

bool is_forked_child() { return forked.load(std::memory_order_relaxed); }

}  // namespace fastopt
