// What all kernels share: types, rows of elements, and numbers that sort as floats do.
//
// All arithmetic is in float32, whatever the tensors are kept in. Kernels find their image and their part of it in the
// one-dimensional number of their block, because only that dimension of a grid has room for any batch.
#pragma once

#ifdef __CUDACC__
#include "ptx.cuh"
#endif

using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};
// What a 16-byte access moves.
struct alignas(16) Quad {
    u32 word[4];
};
struct alignas(16) Float4 {
    float at[4];
};

// What moves WIDTH elements of type T, one or 16 bytes.
template <class T, int WIDTH> struct Moving {
    using Type = Quad;
};
template <class T> struct Moving<T, 1> {
    using Type = T;
};
template <class T, int WIDTH> using Moved = typename Moving<T, WIDTH>::Type;

constexpr int WARP = 32;
constexpr u32 ALL = 0xffffffffu;

DEVICE float infinite() { return bits_to_float(0x7f800000u); }

DEVICE int lane_id() { return threadIdx.x % WARP; }
DEVICE int warp_id() { return threadIdx.x / WARP; }

DEVICE float to_float(float value) { return value; }
DEVICE float to_float(f16 value) { return half_to_float(value.bits); }
DEVICE float to_float(bf16 value) { return bits_to_float(u32(value.bits) << 16); }

// The nearest value of type T, ties to even.
template <class T> METHOD T from_float(float value);
template <> METHOD float from_float<float>(float value) { return value; }
template <> METHOD f16 from_float<f16>(float value) { return {float_to_half(value)}; }
template <> METHOD bf16 from_float<bf16>(float value) {
    u32 bits = float_to_bits(value);
    u32 nearest = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    // Rounding must not turn a NaN into an infinity.
    return {u16(value != value ? bits >> 16 | 0x40u : nearest)};
}

// Elements of type T in 16 bytes.
template <class T> constexpr int WIDE = 16 / sizeof(T);

// WIDTH elements as float32: one, or 16 bytes at once from an address that allows it.
template <int WIDTH, class T> DEVICE void load(float (&to)[WIDTH], const T* from) {
    if constexpr (WIDTH == 1) {
        to[0] = to_float(*from);
    } else {
        static_assert(WIDTH == WIDE<T>);
        Quad quad = *reinterpret_cast<const Quad*>(from);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            if constexpr (sizeof(T) == 4) {
                to[i] = bits_to_float(quad.word[i]);
            } else {
                to[i] = to_float(T{u16(quad.word[i / 2] >> 16 * (i % 2))});
            }
        }
    }
}

template <int WIDTH, class T> DEVICE void store(T* to, const float (&from)[WIDTH]) {
    if constexpr (WIDTH == 1) {
        *to = from_float<T>(from[0]);
    } else {
        static_assert(WIDTH == WIDE<T>);
        Quad quad = {};
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            if constexpr (sizeof(T) == 4) {
                quad.word[i] = float_to_bits(from[i]);
            } else {
                quad.word[i / 2] |= u32(from_float<T>(from[i]).bits) << 16 * (i % 2);
            }
        }
        *reinterpret_cast<Quad*>(to) = quad;
    }
}

// An integer that is larger where the float is larger; NaN above all, zeros of both signs equal.
DEVICE u32 sortable(float value) {
    u32 bits = float_to_bits(value + 0.0f);
    return value != value ? ALL : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// A position and its sortable score as one number: the larger the higher the score, then the lower the position.
DEVICE u64 ranked(u32 score, int position) { return u64(score) << 32 | (ALL - u32(position)); }
DEVICE int ranked_position(u64 entry) { return int(ALL - u32(entry)); }

// Sorts, the largest first; all threads of the block together. `count` is a power of two.
template <int THREADS> DEVICE void sort_falling(u64* entries, int count) {
    for (int span = 2; span <= count; span *= 2) {
        for (int distance = span / 2; distance; distance /= 2) {
            for (int i = threadIdx.x; i < count / 2; i += THREADS) {
                int low = i / distance * 2 * distance + i % distance;
                int high = low + distance;
                bool rising = low & span;
                u64 first = entries[low], second = entries[high];
                if ((first < second) != rising) {
                    entries[low] = second;
                    entries[high] = first;
                }
            }
            __syncthreads();
        }
    }
}

DEVICE float warp_sum(float value) {
#pragma unroll
    for (int distance = WARP / 2; distance; distance /= 2) {
        value += __shfl_xor_sync(ALL, value, distance);
    }
    return value;
}

DEVICE float warp_max(float value) {
#pragma unroll
    for (int distance = WARP / 2; distance; distance /= 2) {
        value = fmaxf(value, __shfl_xor_sync(ALL, value, distance));
    }
    return value;
}

// Calls `visit` with each entry below `count` for which `wanted` holds, in order; all lanes of the warp together.
template <class Wanted, class Visit> DEVICE void each_entry(int count, Wanted wanted, Visit visit) {
#pragma unroll 1
    for (int first = 0; first < count; first += WARP) {
        int mine = first + lane_id();
        u32 found = __ballot_sync(ALL, mine < count && wanted(mine));
#pragma unroll 1
        for (; found; found &= found - 1) {
            visit(first + __ffs(found) - 1);
        }
    }
}
