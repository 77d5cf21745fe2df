#include "cpu.hpp"

#include <stdexcept>
#ifdef LOKI_X86
#include <cpuid.h>
#endif

namespace loki {
namespace {

#ifdef LOKI_X86
// __builtin_cpu_supports asks the processor and whether the operating system saves the registers.
// But older clangs do not know these two by name.
bool has_bit_of_ecx(unsigned leaf, unsigned bit) {
    unsigned a, b, c = 0, d;
    return __get_cpuid(leaf, &a, &b, &c, &d) && (c >> bit & 1);
}
bool has_f16c() { return has_bit_of_ecx(1, 29); }
bool has_lzcnt() { return has_bit_of_ecx(0x80000001u, 5); }

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && has_lzcnt() &&
           __builtin_cpu_supports("popcnt");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vbmi2");
}
#endif

}  // namespace

std::vector<std::string> usable() {
    std::vector<std::string> names;
#ifdef LOKI_X86
    if (has_avx512()) names.emplace_back("avx512");
    if (has_avx2()) names.emplace_back("avx2");
#endif
    names.emplace_back("portable");
    return names;
}

const Kernels& kernels_of(const std::string& name) {
    bool here = false;
    std::string known;
    for (const std::string& one : usable()) {
        here = here || one == name;
        known += (known.empty() ? "" : ", ") + one;
    }
    if (!here) throw std::invalid_argument("instruction set '" + name + "' cannot run on this machine; it has " + known);
#ifdef LOKI_X86
    if (name == "avx512") return avx512_kernels;
    if (name == "avx2") return avx2_kernels;
#endif
    return portable_kernels;
}

std::vector<std::string> features() {
    std::vector<std::string> names;
#ifdef LOKI_X86
#define LOKI_FEATURE(NAME) \
    if (__builtin_cpu_supports(NAME)) names.emplace_back(NAME)
    LOKI_FEATURE("avx2");
    LOKI_FEATURE("fma");
    if (has_f16c()) names.emplace_back("f16c");
    LOKI_FEATURE("bmi2");
    LOKI_FEATURE("avx512f");
    LOKI_FEATURE("avx512bw");
    LOKI_FEATURE("avx512vl");
    LOKI_FEATURE("avx512dq");
    LOKI_FEATURE("avx512vnni");
    LOKI_FEATURE("avx512bf16");
    LOKI_FEATURE("avx512vbmi2");
#undef LOKI_FEATURE
#endif
    return names;
}

}  // namespace loki
