// One binary, several instruction sets: functions marked FASTOPT_CLONES are compiled for each and chosen at load time.
// FASTOPT_TARGET_V3 and V4 mark a function that is for one of them alone; they are defined where it may be called, if
// FASTOPT_CPU_HAS_V3 or V4 says so.
#pragma once

#if defined(FASTOPT_ONE_LEVEL)
// A build for one instruction set, by the compiler's flags: how tests run the levels below this machine's.
#define FASTOPT_CLONES
#if defined(__AVX512F__)
#define FASTOPT_CPU_HAS_V4 true
#define FASTOPT_TARGET_V4
#else
#define FASTOPT_CPU_HAS_V4 false
#endif
#if defined(__AVX2__) && defined(__F16C__)
#define FASTOPT_CPU_HAS_V3 true
#define FASTOPT_TARGET_V3
#else
#define FASTOPT_CPU_HAS_V3 false
#endif
// Levels by feature (v3: AVX2 and FMA; v4: AVX-512), not by processor name: names would leave other makers on baseline.
#elif defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTOPT_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define FASTOPT_CPU_HAS_V3 __builtin_cpu_supports("x86-64-v3")
#define FASTOPT_CPU_HAS_V4 __builtin_cpu_supports("x86-64-v4")
#define FASTOPT_TARGET_V3 __attribute__((target("arch=x86-64-v3")))
#define FASTOPT_TARGET_V4 __attribute__((target("arch=x86-64-v4")))
#elif defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
// Before GCC 12 the dispatcher does not know the levels.
#define FASTOPT_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#define FASTOPT_CPU_HAS_V3 __builtin_cpu_supports("avx2")
#define FASTOPT_CPU_HAS_V4 __builtin_cpu_supports("avx512f")
#else
// AArch64's baseline has NEON; other compilers get their own baseline.
#define FASTOPT_CLONES
#define FASTOPT_CPU_HAS_V3 false
#define FASTOPT_CPU_HAS_V4 false
#endif

// For code that is fast on Intel's processors only.
#if defined(__x86_64__) && defined(__GNUC__)
#define FASTOPT_CPU_IS_INTEL __builtin_cpu_is("intel")
#else
#define FASTOPT_CPU_IS_INTEL false
#endif

namespace fastopt::cpu {

// The clone of functions marked FASTOPT_CLONES that runs on this machine: "avx512", "avx2", "neon" or "baseline".
inline const char* instruction_set() {
#if defined(__aarch64__)
  return "neon";
#else
  return FASTOPT_CPU_HAS_V4 ? "avx512" : FASTOPT_CPU_HAS_V3 ? "avx2" : "baseline";
#endif
}

}  // namespace fastopt::cpu
