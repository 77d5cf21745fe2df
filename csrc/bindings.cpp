// The Python module: addresses and sizes in, C++ structures out. kernels/native.py has checked every tensor before; what
// depends on the values of small tensors (spans, budgets, indices) is checked here, before a kernel runs.
#include "cpu.hpp"
#include "run.hpp"
#include "threads.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

namespace nb = nanobind;
using namespace loki;

namespace {

template <typename T>
T* at(int64_t address) {
    return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

// Address, and strides in bytes of batch, head and slot.
using Strided = std::array<int64_t, 4>;

Rows rows_of(const Strided& rows, int type) {
    return {at<const char>(rows[0]), rows[1], rows[2], rows[3], static_cast<Type>(type)};
}

// (slots, start, stop, rank, tokens): addresses, 0 where absent.
Visible visible_of(const std::array<int64_t, 5>& v) {
    return {v[0], at<const int64_t>(v[1]), at<const int64_t>(v[2]), at<const int64_t>(v[3]), at<const int64_t>(v[4])};
}

// A layer's encoder, its tensors copied with rows padded to whole vectors.
class OwnEncoder {
public:
    // sizes: heads, dim, rank, tail_rank, words8, words4, words2; tensors: mean, query map, key map, deviations, steps, kappa.
    OwnEncoder(std::array<int64_t, 7> sizes, std::array<int64_t, 6> tensors) {
        auto [heads, dim, rank, tail_rank, words8, words4, words2] = sizes;
        const int64_t padded = (rank + 15) / 16 * 16;
        auto copy = [&](int64_t address, int64_t rows, int64_t columns, int64_t width, float fill) {
            std::vector<float> out(static_cast<size_t>(rows * width), fill);
            for (int64_t i = 0; i < rows; i++)
                std::copy_n(at<const float>(address) + i * columns, columns, out.begin() + i * width);
            return out;
        };
        mean_ = copy(tensors[0], heads, dim, dim, 0.0f);
        query_map_ = copy(tensors[1], heads * dim, rank, padded, 0.0f);
        key_map_ = copy(tensors[2], heads * dim, rank, padded, 0.0f);
        deviations_ = copy(tensors[3], heads, rank, padded, 0.0f);
        steps_ = copy(tensors[4], heads, rank, padded, 1.0f);
        kappa_ = copy(tensors[5], heads, 1, 1, 0.0f);
        auto small = [](int64_t n) { return static_cast<int>(n); };
        view = {small(heads), small(dim), small(rank), small(padded), small(tail_rank), small(4 * (words8 + words4 + words2)),
                {small(words8), small(words4), small(words2)},
                mean_.data(), query_map_.data(), key_map_.data(), deviations_.data(), steps_.data(), kappa_.data()};
    }
    OwnEncoder(const OwnEncoder&) = delete;

    Encoder view;

private:
    std::vector<float> mean_, query_map_, key_map_, deviations_, steps_, kappa_;
};

// What attention of any kind takes: query and output addresses, K, V, element type, scale, soft-cap, learned sinks.
struct Attention {
    Step step = {};

    // sizes: batch, kv_heads, group, dim, type, query, output, sinks (addresses, 0 where absent).
    Attention(std::array<int64_t, 8> sizes, const Strided& keys, const Strided& values, float scale, float soft_cap) {
        step.batch = static_cast<int>(sizes[0]);
        step.kv_heads = static_cast<int>(sizes[1]);
        step.group = static_cast<int>(sizes[2]);
        step.dim = static_cast<int>(sizes[3]);
        const int type = static_cast<int>(sizes[4]);
        step.query = at<const char>(sizes[5]);
        step.output = at<char>(sizes[6]);
        step.sinks = at<const float>(sizes[7]);
        step.keys = rows_of(keys, type);
        step.values = rows_of(values, type);
        step.scale = scale;
        step.soft_cap = soft_cap;
    }
};

// packed address and strides; k address, sinks, recent; indices address and width, addresses of log-mass and mass kept.
using Selection = std::array<int64_t, 10>;

void set_selection(Step& step, const Encoder& encoder, const Selection& s) {
    step.encoder = &encoder;
    step.packed = at<const uint8_t>(s[0]);
    step.packed_batch = s[1];
    step.packed_head = s[2];
    step.indices = at<int32_t>(s[6]);
    step.indices_width = s[7];
    step.log_mass = at<float>(s[8]);
    step.kept = at<float>(s[9]);
}

void check_width(const Step& step, const Plan& plan) {
    if (step.indices && plan.largest_k > step.indices_width)
        throw std::invalid_argument("k is up to " + std::to_string(plan.largest_k) + " but there is room for " +
                                    std::to_string(step.indices_width) + " indices");
}

// Indices (rows, width) of int32 or int64 as int32: each row's leading slots, then -1 alone.
template <typename T>
void narrow(const T* from, int64_t rows, int64_t width, int64_t slots, std::vector<int32_t>& to, std::vector<int32_t>& counts) {
    to.resize(static_cast<size_t>(rows * width));
    counts.resize(static_cast<size_t>(rows));
    for (int64_t row = 0; row < rows; row++) {
        int64_t count = 0, bad = 0;
        const T* in = from + row * width;
        int32_t* out = to.data() + row * width;
        while (count < width && in[count] >= 0) count++;
        for (int64_t i = 0; i < width; i++) {
            bad += i < count ? in[i] >= slots : in[i] != -1;
            out[i] = static_cast<int32_t>(in[i]);
        }
        if (bad)
            throw std::invalid_argument("indices of row " + std::to_string(row) + " are not slots from 0 to " +
                                        std::to_string(slots - 1) + ", padded with -1 at the end");
        counts[static_cast<size_t>(row)] = static_cast<int32_t>(count);
    }
}

// indices: address, bytes of an element, width, slots.
void narrow(const std::array<int64_t, 4>& i, int64_t rows, std::vector<int32_t>& to, std::vector<int32_t>& counts) {
    if (i[1] == 4) narrow(at<const int32_t>(i[0]), rows, i[2], i[3], to, counts);
    else narrow(at<const int64_t>(i[0]), rows, i[2], i[3], to, counts);
}

// One instruction set's operations.
class Operations {
public:
    explicit Operations(const std::string& isa) : kernels_(&kernels_of(isa)) {}

    void encode_keys(int threads, const OwnEncoder& encoder, int batch, const Strided& keys, int type,
                     std::array<int64_t, 3> packed, int64_t start, int64_t stop) const {
        KeyEncoding work = {&encoder.view, rows_of(keys, type), at<uint8_t>(packed[0]), packed[1], packed[2], start, stop};
        runner(threads).encode_keys(work, batch);
    }

    void encode_query(int threads, const OwnEncoder& encoder, const Attention& a, int64_t codes, int64_t numbers,
                      int64_t encoded) const {
        Step step = a.step;
        step.encoder = &encoder.view;
        runner(threads).encode_query(step, at<int8_t>(codes), at<float>(numbers), at<float>(encoded));
    }

    // sizes: batch, heads, dim, slots; sums: values, encoded, products.
    void absorb(int threads, const OwnEncoder* encoder, std::array<int64_t, 4> sizes, const Strided& keys,
                const Strided& values, int type, int64_t sign, std::array<int64_t, 3> sums) const {
        Absorption work = {encoder ? &encoder->view : nullptr, rows_of(keys, type), rows_of(values, type),
                           static_cast<int>(sizes[1]), static_cast<int>(sizes[2]), sizes[3], at<const int8_t>(sign),
                           at<float>(sums[0]), at<float>(sums[1]), at<float>(sums[2])};
        runner(threads).absorb(work, static_cast<int>(sizes[0]));
    }

    void select(int threads, const OwnEncoder& encoder, const Attention& a, const std::array<int64_t, 5>& visible,
                const Selection& selection, std::array<int64_t, 4> query) const {
        Step step = a.step;
        set_selection(step, encoder.view, selection);
        Plan plan(step.batch, visible_of(visible), at<const int64_t>(selection[3]), {selection[4], selection[5]});
        check_width(step, plan);
        runner(threads).select(step, plan, {at<const int8_t>(query[0]), at<const float>(query[1]),
                                            at<const float>(query[2]), at<const float>(query[3])});
    }

    // tail: 0 none, 1 mean, 2 linear; sums: tokens, values, encoded, products.
    void decode_step(int threads, const OwnEncoder& encoder, const Attention& a, const std::array<int64_t, 5>& visible,
                     const Selection& selection, int tail, std::array<int64_t, 4> sums) const {
        Step step = a.step;
        set_selection(step, encoder.view, selection);
        step.tail = static_cast<Tail>(tail);
        step.sum_values = at<const float>(sums[1]);
        step.sum_encoded = at<const float>(sums[2]);
        step.sum_products = at<const float>(sums[3]);
        Plan plan(step.batch, visible_of(visible), at<const int64_t>(selection[3]), {selection[4], selection[5]});
        check_width(step, plan);
        for (int b = 0; b < step.batch && tail; b++) plan.sequences[static_cast<size_t>(b)].covered = at<const float>(sums[0])[b];
        runner(threads).decode_step(step, plan);
    }

    void attend(int threads, const Attention& a, std::array<int64_t, 4> indices, int64_t mass, int64_t values) const {
        std::vector<int32_t> slots, counts;
        narrow(indices, static_cast<int64_t>(a.step.batch) * a.step.kv_heads, slots, counts);
        runner(threads).attend(a.step, slots.data(), indices[2], counts.data(), at<float>(mass), at<float>(values));
    }

    void dense(int threads, const Attention& a, const std::array<int64_t, 5>& visible) const {
        Plan plan(a.step.batch, visible_of(visible), nullptr, {0, 0});
        runner(threads).dense(a.step, plan);
    }

    uint64_t gather(int threads, const Attention& a, std::array<int64_t, 4> indices, int64_t ahead) const {
        std::vector<int32_t> slots, counts;
        narrow(indices, static_cast<int64_t>(a.step.batch) * a.step.kv_heads, slots, counts);
        return runner(threads).gather(a.step, slots.data(), indices[2], counts.data(), std::max<int64_t>(0, ahead));
    }

    uint64_t stream(int threads, int64_t address, int64_t bytes, int64_t ahead) const {
        return runner(threads).stream(at<const char>(address), bytes, std::max<int64_t>(0, ahead));
    }

private:
    Runner runner(int threads) const { return {kernels_, std::clamp(threads, 1, 1024)}; }

    const Kernels* kernels_;
};

}  // namespace

NB_MODULE(_native, m) {
    // The Python side caches operations until the process ends, which is no leak.
    nb::set_leak_warnings(false);
    using Released = nb::call_guard<nb::gil_scoped_release>;
    m.def("usable", &usable);
    m.def("features", &features);
    m.def("shares_openmp", &shares_openmp);
    m.def("use_own_threads", &use_own_threads);
    nb::class_<OwnEncoder>(m, "Encoder").def(nb::init<std::array<int64_t, 7>, std::array<int64_t, 6>>());
    nb::class_<Attention>(m, "Attention")
        .def(nb::init<std::array<int64_t, 8>, const Strided&, const Strided&, float, float>());
    nb::class_<Operations>(m, "Operations")
        .def(nb::init<const std::string&>())
        .def("encode_keys", &Operations::encode_keys, Released())
        .def("encode_query", &Operations::encode_query, Released())
        .def("absorb", &Operations::absorb, nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg(), Released())
        .def("select", &Operations::select, Released())
        .def("decode_step", &Operations::decode_step, Released())
        .def("attend", &Operations::attend, Released())
        .def("dense", &Operations::dense, Released())
        .def("gather", &Operations::gather, Released())
        .def("stream", &Operations::stream, Released());
}
