// Scratch memory of one call, kept for the next: grows to what the largest call of this thread needed.
#pragma once
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace loki {

class Arena {
public:
    // Room for n numbers, 64-byte aligned, not cleared. Valid until the next reset.
    template <typename T>
    T* take(int64_t n) {
        int64_t bytes = (n * static_cast<int64_t>(sizeof(T)) + 127) / 64 * 64;
        if (blocks_.empty() || used_ + bytes > blocks_.back().bytes) {
            total_ += bytes;
            blocks_.emplace_back(bytes > total_ / 2 ? bytes : total_ / 2);
            used_ = 0;
        }
        char* place = blocks_.back().data.get() + used_;
        used_ += bytes;
        return reinterpret_cast<T*>(place);
    }

    // Frees everything taken; what lay in several blocks gets one that holds it all.
    void reset() {
        used_ = 0;
        if (blocks_.size() <= 1) return;
        int64_t bytes = 0;
        for (const Block& block : blocks_) bytes += block.bytes;
        blocks_.clear();
        blocks_.emplace_back(bytes);
    }

    static Arena& of_thread() {
        thread_local Arena arena;
        arena.reset();
        return arena;
    }

private:
    struct Free {
        void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    struct Block {
        explicit Block(int64_t size)
            : data(static_cast<char*>(::operator new(static_cast<size_t>(size), std::align_val_t{64}))), bytes(size) {}
        std::unique_ptr<char, Free> data;
        int64_t bytes;
    };
    std::vector<Block> blocks_;
    int64_t used_ = 0, total_ = 0;
};

}  // namespace loki
