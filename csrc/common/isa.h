// Which of the compiled CPU levels runs. Header-only, because both _C and the ops library ask.
#pragma once

#include <stdexcept>
#include <string>

#include <cstdint>
#include <cstdlib>

#if defined(__x86_64__) && defined(__linux__)
#define PK_X86 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pk {

// Each level includes the ones before it; cmake/isa.cmake holds the compiler flags of each.
enum class Isa : int { baseline, avx2, avx512, avx512_bf16, amx };

constexpr const char* isa_names[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

inline const char* isa_name(Isa level) { return isa_names[static_cast<int>(level)]; }

namespace detail {

#ifdef PK_X86
inline uint64_t enabled_state() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out tile registers on request only: without this call the first tile instruction is a SIGILL.
inline bool ask_for_amx() {
  constexpr int arch_req_xcomp_perm = 0x1023, xtile_data = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xtile_data) == 0;
}
#endif

// The highest level that the CPU has and the operating system saves on a context switch.
inline Isa machine_isa() {
#ifdef PK_X86
  const auto all = [](uint64_t word, uint64_t bits) { return (word & bits) == bits; };
  uint32_t a, b, c, d;
  constexpr uint32_t fma_osxsave_avx_f16c = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !all(c, fma_osxsave_avx_f16c)) return Isa::baseline;
  const uint64_t state = enabled_state();
  if (!all(state, 0x6) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::baseline;
  const uint32_t leaf7_ebx = b, leaf7_ecx = c, leaf7_edx = d;
  constexpr uint32_t avx2_bmi2 = 1u << 5 | 1u << 8, avx512_f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
  if (!all(leaf7_ebx, avx2_bmi2)) return Isa::baseline;
  if (!all(leaf7_ebx, avx512_f_dq_bw_vl) || !all(state, 0xe6)) return Isa::avx2;
  constexpr uint32_t avx512_vbmi = 1u << 1, avx512_bf16 = 1u << 5, amx_bf16_tile = 1u << 22 | 1u << 24;
  if (!all(leaf7_ecx, avx512_vbmi) || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !all(a, avx512_bf16))
    return Isa::avx512;
  if (!all(leaf7_edx, amx_bf16_tile) || !all(state, 0x60000) || !ask_for_amx()) return Isa::avx512_bf16;
  return Isa::amx;
#else
  return Isa::baseline;
#endif
}

}  // namespace detail

struct IsaChoice {
  Isa level;
  std::string error;  // why PEFT_KERNELS_CPU_ISA cannot be honoured; empty when all is well
};

// Asked once per process: a level that changed between two calls would change results between two calls.
inline const IsaChoice& isa_choice() {
  static const IsaChoice choice = [] {
    const Isa highest = detail::machine_isa();
    const char* wanted = std::getenv("PEFT_KERNELS_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return IsaChoice{highest, ""};
    std::string choices;
    for (int level = 0; level <= static_cast<int>(highest); ++level) {
      if (std::string(wanted) == isa_names[level]) return IsaChoice{static_cast<Isa>(level), ""};
      choices += (level ? ", " : "") + std::string(isa_names[level]);
    }
    return IsaChoice{highest,
                     "PEFT_KERNELS_CPU_ISA=" + std::string(wanted) + " is not a level of this machine: " + choices};
  }();
  return choice;
}

// The level in use. Throws on an override that cannot be honoured, so call it outside parallel_for.
inline Isa isa() {
  const IsaChoice& choice = isa_choice();
  if (!choice.error.empty()) throw std::invalid_argument(choice.error);
  return choice.level;
}

}  // namespace pk

// PK_DECLARE_ISA(void f(int);) declares f once per level; the definition is in <op>_cpu.cpp, in namespace pk::PK_ISA.
// PK_DISPATCH_ISA(f, args...) calls the f of the level in use, from any namespace. There is none among emulated
// kernels.
#ifdef PK_X86
#define PK_DECLARE_ISA(...) \
  namespace pk {            \
  namespace baseline {      \
  __VA_ARGS__               \
  }                         \
  namespace avx2 {          \
  __VA_ARGS__               \
  }                         \
  namespace avx512 {        \
  __VA_ARGS__               \
  }                         \
  namespace avx512_bf16 {   \
  __VA_ARGS__               \
  }                         \
  namespace amx {           \
  __VA_ARGS__               \
  }                         \
  }
#define PK_DISPATCH_ISA(fn, ...)                   \
  [&] {                                            \
    switch (::pk::isa()) {                         \
      case ::pk::Isa::amx:                         \
        return ::pk::amx::fn(__VA_ARGS__);         \
      case ::pk::Isa::avx512_bf16:                 \
        return ::pk::avx512_bf16::fn(__VA_ARGS__); \
      case ::pk::Isa::avx512:                      \
        return ::pk::avx512::fn(__VA_ARGS__);      \
      case ::pk::Isa::avx2:                        \
        return ::pk::avx2::fn(__VA_ARGS__);        \
      default:                                     \
        return ::pk::baseline::fn(__VA_ARGS__);    \
    }                                              \
  }()
#else
#define PK_DECLARE_ISA(...) \
  namespace pk {            \
  namespace baseline {      \
  __VA_ARGS__               \
  }                         \
  }
#define PK_DISPATCH_ISA(fn, ...) [&] { return ::pk::baseline::fn(__VA_ARGS__); }()
#endif
#ifdef PK_EMULATE
#undef PK_DISPATCH_ISA
#define PK_DISPATCH_ISA(fn, ...) \
  [&]() -> decltype(::pk::baseline::fn(__VA_ARGS__)) { throw std::logic_error(#fn " has no emulated CUDA kernel"); }()
#endif
