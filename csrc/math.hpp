// Elementary functions of sixteen numbers, and the rows they are made from. Included inside the kernels' own namespace.
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.69314718055994531f;
constexpr float LOWEST = -1e30f;

// 2^t to 1 ulp or two; 0 far below, finite far above.
inline V exp2(V t) {
    t = vmin(vmax(t, set1(-126.0f)), set1(127.0f));
    V whole = round_even(t), f = sub(t, whole);
    V p = set1(1.5252734e-5f);
    p = fma(p, f, set1(1.5403530e-4f));
    p = fma(p, f, set1(1.3333558e-3f));
    p = fma(p, f, set1(9.6181291e-3f));
    p = fma(p, f, set1(5.5504109e-2f));
    p = fma(p, f, set1(2.4022651e-1f));
    p = fma(p, f, set1(6.9314718e-1f));
    p = fma(p, f, set1(1.0f));
    return times_power_of_2(p, whole);
}

inline V tanh(V x) {
    V size = vabs(x), square = mul(x, x);
    V p = set1(-5.70498872745e-3f);
    p = fma(p, square, set1(2.06390887954e-2f));
    p = fma(p, square, set1(-5.37397155531e-2f));
    p = fma(p, square, set1(1.33314422036e-1f));
    p = fma(p, square, set1(-3.33332819422e-1f));
    V small = fma(mul(p, square), x, x);
    V one = set1(1.0f);
    V far = sub(one, div(set1(2.0f), add(exp2(mul(size, set1(2.0f * LOG2_E))), one)));
    far = if_less(x, zero(), sub(zero(), far), far);
    return if_less(size, set1(0.625f), small, far);
}

inline V capped(V score, float cap) { return mul(tanh(mul(score, set1(1.0f / cap))), set1(cap)); }

template <Type T>
struct Element;
template <>
struct Element<Type::float32> {
    using type = float;
    static V load16(const float* p) { return load(p); }
    static V load_some(const float* p, int n) { return load_part(p, n); }
};
template <>
struct Element<Type::bfloat16> {
    using type = uint16_t;
    static V load16(const uint16_t* p) { return load_bf16(p); }
    static V load_some(const uint16_t* p, int n) { return load_bf16_part(p, n); }
};
template <>
struct Element<Type::float16> {
    using type = uint16_t;
    static V load16(const uint16_t* p) { return load_f16(p); }
    static V load_some(const uint16_t* p, int n) { return load_f16_part(p, n); }
};

// Elements from..from+15 of a row of dim elements; zero beyond its end, which is never read. WHOLE: dim is a multiple of 16.
template <Type T, bool WHOLE>
inline V piece(const char* row, int from, int dim) {
    auto p = reinterpret_cast<const typename Element<T>::type*>(row) + from;
    if (WHOLE || from + 16 <= dim) return Element<T>::load16(p);
    return Element<T>::load_some(p, dim - from);
}

inline V piece(Type type, const char* row, int from, int dim) {
    if (type == Type::float32) return piece<Type::float32, false>(row, from, dim);
    if (type == Type::bfloat16) return piece<Type::bfloat16, false>(row, from, dim);
    return piece<Type::float16, false>(row, from, dim);
}

inline int element_bytes(Type type) { return type == Type::float32 ? 4 : 2; }
inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline void prefetch(const char* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_far(const char* p) { __builtin_prefetch(p, 0, 2); }
