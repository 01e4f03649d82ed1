// What the kernels need of CUDA, on the host: blocks one after the other, the threads of a block as fibers.
//
// A fiber runs until it waits at a barrier; then the next one runs. In which order is up to the caller: what a kernel
// computes must not depend on it, and does where a barrier is missing. Shared memory and the targets of asynchronous
// copies are filled with NaNs first, and copies happen as late as waits allow, so that reading too early shows.
//
// Matrix instructions follow the PTX ISA ("Warp-level matrix instructions", figures of the fragments): each says here
// which lane holds which element.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#define DEVICE static inline
#define METHOD inline
#define ARCH HOST_ARCH
#define KERNEL(name, Arguments, threads)                                                                               \
    static_assert(std::is_trivially_copyable_v<Arguments>);                                                            \
    static void name##_body(const Arguments& arguments);                                                               \
    extern "C" void name(const void* arguments) { name##_body(*static_cast<const Arguments*>(arguments)); }            \
    extern "C" const int name##_threads, name##_arguments;                                                             \
    const int name##_threads = threads, name##_arguments = sizeof(Arguments);                                          \
    static void name##_body(const Arguments& arguments)

using std::max;
using std::min;

struct Dimension {
    int x;
};

namespace host {

// ------------------------------------------------------------------------------------------------------------- fibers

constexpr int LANES = 32;
constexpr size_t STACK = 256 << 10;

using Context = void*; // the stack pointer of a fiber that waits
extern "C" void host_switch(Context* from, Context to);
#if defined(__x86_64__)
asm(R"(
.text
.type host_switch, @function
host_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    retq
.size host_switch, .-host_switch
)");
constexpr int ENTRY = 6, FRAME = 8;
#elif defined(__aarch64__)
asm(R"(
.text
.type host_switch, %function
host_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size host_switch, .-host_switch
)");
constexpr int ENTRY = 11, FRAME = 20;
#else
#error "fibers are written for x86-64 and AArch64"
#endif

// Where fibers wait for each other: the last to come lets all go on.
struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
};

// What the lanes of a warp hand each other, twice: who is done with one exchange may begin the next before others have
// read, but not the one after.
struct Warp {
    Barrier barrier;
    uint64_t given[2][LANES][8];
    uint64_t taken[2][LANES][4];
};

struct Copy {
    void* to;
    unsigned char bytes[16];
};

struct Fiber {
    Context context;
    std::vector<unsigned char> stack = std::vector<unsigned char>(STACK);
    Barrier* waits; // null: it can run
    unsigned generation;
    bool done;
    std::vector<std::vector<Copy>> copies; // groups under way, then the open one
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Barrier barrier;
    std::vector<unsigned char> shared;
    Context scheduler;
    Fiber* running;
    void (*kernel)(const void*);
    const void* arguments;
};

// Not `inline`: such variables are the same in all libraries of a process.
static Block block;
static const char* failure = nullptr;

inline void wait(Barrier& barrier, int expected) {
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        barrier.generation++;
        return;
    }
    Fiber* self = block.running;
    self->waits = &barrier;
    self->generation = barrier.generation;
    host_switch(&self->context, block.scheduler);
}

inline void fiber_main() {
    block.kernel(block.arguments);
    block.running->done = true;
    // No local variables: a frame that is never left would stay poisoned for the next fiber on this stack.
    host_switch(&block.running->context, block.scheduler);
    std::abort();
}

} // namespace host

static Dimension threadIdx, blockIdx, blockDim, gridDim;

// --------------------------------------------------------------------------------------------------- what kernels call

inline unsigned char* shared_memory() { return host::block.shared.data(); }

inline void __syncthreads() { host::wait(host::block.barrier, blockDim.x); }

// A collective of the warp: each lane gives words, the last to come computes what each of them takes.
template <class Given, class Compute> uint64_t* collective(const Given& given, Compute compute) {
    static_assert(sizeof(Given) <= sizeof(host::Warp::given[0][0]));
    host::Warp& warp = host::block.warps[threadIdx.x / host::LANES];
    int side = warp.barrier.generation % 2, lane = threadIdx.x % host::LANES;
    std::memcpy(warp.given[side][lane], &given, sizeof given);
    if (warp.barrier.arrived == host::LANES - 1) {
        compute(warp.given[side], warp.taken[side]);
    }
    host::wait(warp.barrier, host::LANES);
    return warp.taken[side][lane];
}

inline void require_all(unsigned mask) {
    if (mask != 0xffffffffu) {
        host::failure = "a collective of less than a warp";
    }
}

inline void __syncwarp() {
    collective(0, [](auto&, auto&) {});
}

template <class T, class Source> T shuffle(unsigned mask, T value, Source source) {
    require_all(mask);
    uint64_t* taken = collective(value, [=](auto& given, auto& taken) {
        for (int lane = 0; lane < host::LANES; lane++) {
            taken[lane][0] = given[source(lane)][0];
        }
    });
    T result;
    std::memcpy(&result, taken, sizeof result);
    return result;
}

template <class T> T __shfl_xor_sync(unsigned mask, T value, int distance) {
    return shuffle(mask, value, [=](int lane) { return lane ^ distance; });
}
template <class T> T __shfl_up_sync(unsigned mask, T value, int distance) {
    return shuffle(mask, value, [=](int lane) { return lane < distance ? lane : lane - distance; });
}
template <class T> T __shfl_sync(unsigned mask, T value, int from) {
    return shuffle(mask, value, [=](int) { return from % host::LANES; });
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
    require_all(mask);
    return unsigned(*collective(uint64_t(vote), [](auto& given, auto& taken) {
        uint64_t bits = 0;
        for (int lane = 0; lane < host::LANES; lane++) {
            bits |= given[lane][0] << lane;
        }
        for (int lane = 0; lane < host::LANES; lane++) {
            taken[lane][0] = bits;
        }
    }));
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }

inline float bits_to_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned float_to_bits(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float half_to_float(unsigned short bits) {
    static const std::vector<float> all = [] {
        std::vector<float> all(1 << 16);
        for (int bits = 0; bits < 1 << 16; bits++) {
            int exponent = bits >> 10 & 31, mantissa = bits & 1023;
            float value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent     ? std::ldexp(float(mantissa + 1024), exponent - 25)
                                         : std::ldexp(float(mantissa), -24);
            all[bits] = bits >> 15 ? -value : value;
        }
        return all;
    }();
    return all[bits];
}

inline unsigned short float_to_half(float value) {
    unsigned short sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) {
        return 0x7fff;
    }
    float size = std::fabs(value);
    if (size >= 65520) {
        return sign | 0x7c00;
    }
    // The unit of the last place; rounding to it is to even by the default mode of the host.
    int exponent = std::max(size > 0 ? std::ilogb(size) : -14, -14);
    int units = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
    // Units of 1024 and more carry the exponent's one along.
    return sign | (((exponent + 14) << 10) + units);
}

inline float exp2_fast(float value) { return std::exp2(value); }

using SharedAddress = const char*;

inline SharedAddress shared_address(const void* pointer) { return static_cast<const char*>(pointer); }

// Row `lane % 8` of matrix i is where lane 8 i + lane % 8 points; a lane takes elements 2 (lane % 4) and the next of
// row lane / 4 of each.
inline void load_matrices_as(unsigned (&to)[4], SharedAddress row, bool transposed) {
    if (uintptr_t(row) % 16) {
        host::failure = "a row of a matrix that is not aligned";
    }
    uint64_t* taken = collective(row, [=](auto& given, auto& taken) {
        unsigned short matrix[4][8][8];
        for (int lane = 0; lane < host::LANES; lane++) {
            std::memcpy(matrix[lane / 8][lane % 8], reinterpret_cast<void*>(given[lane][0]), 16);
        }
        for (int lane = 0; lane < host::LANES; lane++) {
            unsigned result[4];
            for (int i = 0; i < 4; i++) {
                unsigned pair[2];
                for (int j = 0; j < 2; j++) {
                    int r = lane / 4, c = lane % 4 * 2 + j;
                    pair[j] = transposed ? matrix[i][c][r] : matrix[i][r][c];
                }
                result[i] = pair[0] | pair[1] << 16;
            }
            std::memcpy(taken[lane], result, sizeof result);
        }
    });
    std::memcpy(to, taken, sizeof to);
}
inline void load_matrices(unsigned (&to)[4], SharedAddress row) { load_matrices_as(to, row, false); }
inline void load_matrices_transposed(unsigned (&to)[4], SharedAddress row) { load_matrices_as(to, row, true); }

struct Fragments {
    float sum[4];
    unsigned a[4], b[2];
};

// sum += a b, with a 16 × K and b K × 8, K at most 16. `a_at(register, lane, half)` and `b_at` say which element (row,
// column) a lane holds in a register; the sum has row lane / 4 + 8 (i / 2), column 2 (lane % 4) + i % 2 in register i.
template <int K, int HALVES, class At, class Bt, class Value>
void multiply(float (&sum)[4], const unsigned* a, const unsigned* b, At a_at, Bt b_at, Value value) {
    constexpr int A = 16 * K / HALVES / host::LANES, B = 8 * K / HALVES / host::LANES;
    Fragments mine = {};
    std::copy(sum, sum + 4, mine.sum);
    std::copy(a, a + A, mine.a);
    std::copy(b, b + B, mine.b);
    uint64_t* taken = collective(mine, [=](auto& given, auto& taken) {
        float left[16][K], right[K][8];
        for (int lane = 0; lane < host::LANES; lane++) {
            Fragments of;
            std::memcpy(&of, given[lane], sizeof of);
            for (int half = 0; half < HALVES; half++) {
                for (int i = 0; i < A; i++) {
                    auto [row, column] = a_at(i, lane, half);
                    left[row][column] = value(of.a[i], half);
                }
                for (int i = 0; i < B; i++) {
                    auto [row, column] = b_at(i, lane, half);
                    right[row][column] = value(of.b[i], half);
                }
            }
        }
        for (int lane = 0; lane < host::LANES; lane++) {
            Fragments of;
            std::memcpy(&of, given[lane], sizeof of);
            for (int i = 0; i < 4; i++) {
                int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
                for (int k = 0; k < K; k++) {
                    of.sum[i] += left[row][k] * right[k][column];
                }
            }
            std::memcpy(taken[lane], of.sum, sizeof of.sum);
        }
    });
    std::memcpy(sum, taken, sizeof sum);
}

struct Element {
    int row, column;
};
template <int K, class Value>
void multiply_16_bit(float (&sum)[4], const unsigned* a, const unsigned* b, Value value) {
    multiply<K, 2>(
        sum, a, b,
        [](int i, int lane, int half) { return Element{lane / 4 + 8 * (i % 2), lane % 4 * 2 + half + 8 * (i / 2)}; },
        [](int i, int lane, int half) { return Element{lane % 4 * 2 + half + 8 * i, lane / 4}; },
        [=](unsigned word, int half) { return value((unsigned short)(word >> 16 * half)); });
}

inline void multiply_f16_k8(float (&sum)[4], unsigned a0, unsigned a1, unsigned b) {
    unsigned a[2] = {a0, a1};
    multiply_16_bit<8>(sum, a, &b, half_to_float);
}
#if ARCH >= 800
inline unsigned floats_to_bfloats(float low, float high) {
    auto nearest = [](float value) {
        unsigned bits = float_to_bits(value);
        return std::isnan(value) ? 0x7fffu : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return nearest(low) | nearest(high) << 16;
}

inline void multiply_f16_k16(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    unsigned b[2] = {b0, b1};
    multiply_16_bit<16>(sum, a, b, half_to_float);
}
inline void multiply_bf16_k16(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    unsigned b[2] = {b0, b1};
    multiply_16_bit<16>(sum, a, b, [](unsigned short bits) { return bits_to_float(unsigned(bits) << 16); });
}
inline void multiply_tf32_k8(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    unsigned b[2] = {b0, b1};
    multiply<8, 1>(
        sum, a, b, [](int i, int lane, int) { return Element{lane / 4 + 8 * (i % 2), lane % 4 + 4 * (i / 2)}; },
        [](int i, int lane, int) { return Element{lane % 4 + 4 * i, lane / 4}; },
        [](unsigned word, int) { return bits_to_float(word & ~0x1fffu); });
}

inline void copy_async(void* to, const void* from, bool zeros) {
    if (uintptr_t(to) % 16 || uintptr_t(from) % 16) {
        host::failure = "an asynchronous copy that is not aligned";
    }
    host::Copy copy = {to, {}};
    if (!zeros) {
        std::memcpy(copy.bytes, from, 16);
    }
    std::memset(to, 0xff, 16);
    host::block.running->copies.back().push_back(copy);
}
inline void copy_async_commit() { host::block.running->copies.emplace_back(); }
template <int LATEST> void copy_async_wait() {
    auto& copies = host::block.running->copies;
    while (copies.size() > LATEST + 1) {
        for (const host::Copy& copy : copies.front()) {
            std::memcpy(copy.to, copy.bytes, 16);
        }
        copies.erase(copies.begin());
    }
}
#endif

// -------------------------------------------------------------------------------------------------------------- launch

// Runs a kernel. `order` 0: blocks and threads forward, warps in step; 1: backward, each warp as far ahead of the
// others as it gets; others: the same, shuffled by that seed. Null, or what is wrong.
extern "C" const char* host_launch(void (*kernel)(const void*), int blocks, int threads, int shared_bytes,
                                   const void* arguments, unsigned order) {
    using namespace host;
    failure = nullptr;
    block.kernel = kernel;
    block.arguments = arguments;
    block.fibers.resize(threads);
    block.warps.resize(threads / LANES);
    blockDim.x = threads;
    gridDim.x = blocks;
    std::mt19937 random(order);
    auto arranged = [&](int count) {
        std::vector<int> numbers(count);
        std::iota(numbers.begin(), numbers.end(), 0);
        if (order == 1) {
            std::reverse(numbers.begin(), numbers.end());
        } else if (order) {
            std::shuffle(numbers.begin(), numbers.end(), random);
        }
        return numbers;
    };
    // Threads by warp, both in the order asked for.
    int step = order ? LANES : threads;
    std::vector<int> block_order = arranged(blocks), thread_order;
    for (int warp : arranged(threads / LANES)) {
        for (int lane : arranged(LANES)) {
            thread_order.push_back(warp * LANES + lane);
        }
    }
    for (int number : block_order) {
        blockIdx.x = number;
        block.barrier = {};
        // Of exactly this size, so that the address sanitizer sees what lies behind.
        block.shared = std::vector<unsigned char>(shared_bytes, 0xff);
        for (Warp& warp : block.warps) {
            warp.barrier = {};
        }
        for (Fiber& fiber : block.fibers) {
            auto top = reinterpret_cast<void**>((uintptr_t(fiber.stack.data()) + STACK) / 16 * 16) - FRAME;
            std::fill(top, top + FRAME, nullptr);
            top[ENTRY] = reinterpret_cast<void*>(fiber_main);
            fiber.context = top;
            fiber.waits = nullptr;
            fiber.done = false;
            fiber.copies.assign(1, {});
        }
        int left = threads;
        while (left) {
            bool moved = false;
            for (int first = 0; first < threads; first += step) {
                // Warps in step with each other, or each as far as it can get alone.
                bool again = true;
                while (again) {
                    again = false;
                    for (int i = first; i < first + step; i++) {
                        int thread = thread_order[i];
                        Fiber& fiber = block.fibers[thread];
                        if (fiber.done || (fiber.waits && fiber.waits->generation == fiber.generation)) {
                            continue;
                        }
                        moved = true;
                        again = step < threads;
                        fiber.waits = nullptr;
                        threadIdx.x = thread;
                        block.running = &fiber;
                        host_switch(&block.scheduler, fiber.context);
                        left -= fiber.done;
                    }
                }
            }
            if (!moved) {
                return "threads wait at different barriers";
            }
        }
        if (failure) {
            return failure;
        }
    }
    return nullptr;
}
