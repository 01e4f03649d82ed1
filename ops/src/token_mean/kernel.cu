// TokenMean: a warp for each slot. mod.rs says what the operator means, cuda.rs what is launched.
#include "common.cuh"

// As `MeanArguments` in cuda.rs.
struct Mean {
    const void* table;
    const i64* assign;
    const float* size;
    void* y;
    i64 image_entries; // from the table of an image to that of the next: 0 if all have the same
    i64 rows;          // slots of all images
    int tokens, slots, channels;
    int wide; // rows can be moved in pieces of 16 bytes
};

constexpr int THREADS = 256;
constexpr int PIECES = 2; // of WIDTH channels for each lane, in registers at once

// Sums in order of position.
template <class T, int WIDTH> DEVICE void mean(const Mean& p, i64 row) {
    i64 image = row / p.slots;
    int slot = int(row % p.slots);
    const T* table = static_cast<const T*>(p.table) + image * p.image_entries;
    const i64* assign = p.assign + image * p.tokens;
    T* y = static_cast<T*>(p.y) + row * p.channels;
#pragma unroll 1
    for (int start = 0; start < p.channels; start += WARP * WIDTH * PIECES) {
        float sum[PIECES][WIDTH] = {};
        auto member = [&](int token) { return assign[token] == slot; };
        each_entry(p.tokens, member, [&](int token) {
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) {
                int channel = start + (piece * WARP + lane_id()) * WIDTH;
                if (channel < p.channels) {
                    float value[WIDTH];
                    load<WIDTH>(value, table + i64(token) * p.channels + channel);
#pragma unroll
                    for (int i = 0; i < WIDTH; i++) {
                        sum[piece][i] += value[i];
                    }
                }
            }
        });
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
            int channel = start + (piece * WARP + lane_id()) * WIDTH;
            if (channel < p.channels) {
#pragma unroll
                for (int i = 0; i < WIDTH; i++) {
                    sum[piece][i] /= p.size[row];
                }
                store<WIDTH>(y + channel, sum[piece]);
            }
        }
    }
}

template <class T> DEVICE void mean_of(const Mean& p) {
    i64 row = i64(blockIdx.x) * (THREADS / WARP) + warp_id();
    if (row >= p.rows) {
        return;
    }
    if (p.wide) {
        mean<T, WIDE<T>>(p, row);
    } else {
        mean<T, 1>(p, row);
    }
}

KERNEL(token_mean_f32, Mean, THREADS) { mean_of<float>(arguments); }
KERNEL(token_mean_f16, Mean, THREADS) { mean_of<f16>(arguments); }
KERNEL(token_mean_bf16, Mean, THREADS) { mean_of<bf16>(arguments); }
