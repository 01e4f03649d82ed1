// TokenRestore: a warp copies the row of each token. mod.rs says what the operator means, cuda.rs what is launched.
#include "common.cuh"

// As `RestoreArguments` in cuda.rs. A row is `pieces` of what the kernel moves at once.
struct Restore {
    const void* y;
    const i64* assign;
    void* x;
    i64 rows;
    i64 pieces;
    int tokens, slots;
};

constexpr int THREADS = 256;

template <class Piece> DEVICE void restore(const Restore& p) {
    i64 row = i64(blockIdx.x) * (THREADS / WARP) + warp_id();
    if (row >= p.rows) {
        return;
    }
    i64 image = row / p.tokens, slot = p.assign[row];
    // What no slot is named for becomes zero rather than a fault of the device.
    bool known = u64(slot) < u64(p.slots);
    const Piece* from = static_cast<const Piece*>(p.y) + (known ? image * p.slots + slot : 0) * p.pieces;
    Piece* to = static_cast<Piece*>(p.x) + row * p.pieces;
    for (i64 i = lane_id(); i < p.pieces; i += WARP) {
        to[i] = known ? from[i] : Piece{};
    }
}

KERNEL(restore_1, Restore, THREADS) { restore<unsigned char>(arguments); }
KERNEL(restore_2, Restore, THREADS) { restore<u16>(arguments); }
KERNEL(restore_4, Restore, THREADS) { restore<u32>(arguments); }
KERNEL(restore_16, Restore, THREADS) { restore<Quad>(arguments); }
