// TokenAssign: a thread for each token that is listed. mod.rs says what the operator means, cuda.rs what is launched.
#include "common.cuh"

// As `AssignArguments` in cuda.rs.
struct Assign {
    const i64* anchor;
    const i64* leaving;
    const i64* into;
    i64* assign;
    i64 count; // tokens of all images
    int slots, r;
};

constexpr int THREADS = 256;

// Anchors and leaving tokens together are a permutation of all: each is written once.
KERNEL(token_assign, Assign, THREADS) {
    const Assign& p = arguments;
    i64 i = i64(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= p.count) {
        return;
    }
    int tokens = p.slots + p.r;
    i64 image = i / tokens;
    int listed = int(i % tokens), l = listed - p.slots;
    i64 token = l < 0 ? p.anchor[image * p.slots + listed] : p.leaving[image * p.r + l];
    i64 slot = l < 0 ? listed : p.into[image * p.r + l];
    // A position that is none must not become a write to anywhere.
    if (u64(token) < u64(tokens)) {
        p.assign[image * tokens + token] = slot;
    }
}
