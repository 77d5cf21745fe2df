// A step's phases over all (sequence, KV head) pairs: what runs together, what is split, where scratch memory lies.
#pragma once
#include "plan.hpp"
#include "types.hpp"

namespace loki {

struct Runner {
    const Kernels* kernels;
    int threads;

    // The whole step: encode, select, tail, attend. Query rows are encoded here.
    void decode_step(Step step, const Plan& plan) const;
    // Selection alone, by query codes (B, H, R) with step, deviation and offset (B, H).
    void select(Step step, const Plan& plan, const QueryCodes& query) const;
    // The encoded query: codes (B, H, R), then step, deviation and offset (3, B, H), and q A_q (B, H, R).
    void encode_query(const Step& step, int8_t* codes, float* numbers, float* encoded) const;
    // Attention over slots (B, Hkv, width), the first counts[item] of each row; tail_mass (B, H), tail_values (B, H, D).
    void attend(Step step, const int32_t* slots, int64_t width, const int32_t* counts, float* tail_mass,
                float* tail_values) const;
    void dense(Step step, const Plan& plan) const;
    void encode_keys(const KeyEncoding& work, int batch) const;
    void absorb(const Absorption& work, int batch) const;
    // `ahead`: bytes, or tokens, between what is read and what is fetched.
    uint64_t gather(const Step& step, const int32_t* slots, int64_t width, const int32_t* counts, int64_t ahead) const;
    uint64_t stream(const char* data, int64_t bytes, int64_t ahead) const;
};

}  // namespace loki
