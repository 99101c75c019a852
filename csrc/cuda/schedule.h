// Which rows and keys a block of the attention kernel processes, and how partial results are merged. The same plain arithmetic runs on the
// device, in the launch and in the tests.
#pragma once

#include <cmath>
#include <cstdint>

#include "page4d/mask_attention.h"

#if defined(__CUDACC__)
#define PAGE4D_HOST_DEVICE __host__ __device__
#else
#define PAGE4D_HOST_DEVICE
#endif

namespace page4d::cuda {

// A tile of query rows of one head, against a range of key tiles.
struct WorkTile {
    int tile, split, head, batch;
    int first_key_tile, last_key_tile;  // last_key_tile is exclusive
};

// The work tiles, in order. The query rows of a head are divided into tiles. With a layout, only the first `special` rows of each frame are gated.
// Packed tiles gather the gated rows of whole frames and come first. The other tiles are contiguous and skip these rows.
struct TileScheduler {
    int queries, keys, heads, batch;
    int per_frame, special, frames;  // special = 0: no layout
    int tile_rows, tile_keys, splits;
    // Derived once on the host. Computed in the kernel, they would occupy registers.
    int packed_frames, packed_tiles;       // frames per packed tile, and the number of packed tiles
    int tiles, key_tiles, key_tiles_each;  // per head (tiles, key_tiles) and per split
    int work;                              // number of work tiles

    PAGE4D_HOST_DEVICE static int ceil_div(int a, int b) { return (a + b - 1) / b; }

    TileScheduler() = default;
    TileScheduler(int queries, int keys, int heads, int batch, int per_frame, int special, int frames, int tile_rows, int tile_keys, int splits)
        : queries(queries),
          keys(keys),
          heads(heads),
          batch(batch),
          per_frame(per_frame),
          special(special),
          frames(frames),
          tile_rows(tile_rows),
          tile_keys(tile_keys),
          splits(splits) {
        packed_frames = special ? tile_rows / special : 0;
        packed_tiles = special ? ceil_div(frames, packed_frames) : 0;
        tiles = packed_tiles + ceil_div(queries, tile_rows);
        key_tiles = ceil_div(keys, tile_keys);
        key_tiles_each = ceil_div(key_tiles, splits);
        work = tiles * splits * heads * batch;
    }

    // Tiles of one head have consecutive indices, so blocks share its keys in the L2 cache.
    PAGE4D_HOST_DEVICE WorkTile at(int index) const {
        const int tile = index % tiles, rest = index / tiles, split = rest % splits, head = rest / splits;
        const int first = split * key_tiles_each, last = first + key_tiles_each;
        return {tile, split, head % heads, head / heads, first, last < key_tiles ? last : key_tiles};
    }

    PAGE4D_HOST_DEVICE bool packed(int tile) const { return tile < packed_tiles; }

    // Sequence position of row i of a tile, or -1 if the tile does not write this row.
    PAGE4D_HOST_DEVICE int row(int tile, int i) const {
        if (packed(tile)) {
            const int frame = tile * packed_frames + i / special;
            return i < packed_frames * special && frame < frames ? frame * per_frame + i % special : -1;
        }
        const int n = (tile - packed_tiles) * tile_rows + i;
        return n < queries && (special == 0 || n % per_frame >= special) ? n : -1;
    }
};

// The number of non-empty splits when `tiles` are divided among `splits`.
inline int whole_splits(int tiles, int splits) { return TileScheduler::ceil_div(tiles, TileScheduler::ceil_div(tiles, splits)); }

// The number of splits of the keys: enough to fill the device, with at least 8 key tiles each.
inline int splits_for(const TileScheduler& whole, int multiprocessors) {
    const int most = whole.key_tiles / 8, wanted = multiprocessors / whole.work, splits = wanted < most ? wanted : most;
    return splits < 2 ? 1 : whole_splits(whole.key_tiles, splits);
}

// Merges partial results by their log-sum-exp, in order: out = sum_i exp(lse_i - row_max) out_i / sum_i exp(lse_i - row_max).
struct Merge {
    float row_max = -INFINITY, row_sum = 0.0f;

    PAGE4D_HOST_DEVICE void see(float lse) { row_max = lse > row_max || lse != lse ? lse : row_max; }  // call for all parts first; NaN stays
    PAGE4D_HOST_DEVICE float weight(float lse) {
        const float w = row_max == -INFINITY ? 0.0f : expf(lse - row_max);
        row_sum += w;
        return w;
    }
    PAGE4D_HOST_DEVICE float factor() const { return row_sum == 0.0f ? 0.0f : 1.0f / row_sum; }
    PAGE4D_HOST_DEVICE float lse() const { return row_sum == 0.0f ? -INFINITY : row_max + logf(row_sum); }
};

}  // namespace page4d::cuda
